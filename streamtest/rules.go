package streamtest

import (
	"bytes"
	"math/rand/v2"
)

// Drop drops a message with probability p.
func Drop(p float64, rng *rand.Rand) Rule {
	return func(*Message) Verdict { return Verdict{Drop: rng.Float64() < p} }
}

// Duplicate sends a message twice with probability p.
func Duplicate(p float64, rng *rand.Rand) Rule {
	return sometimes(p, rng, Verdict{Copies: 1})
}

// Reorder holds a message back with probability p until depth others have overtaken it.
func Reorder(p float64, depth int, rng *rand.Rand) Rule {
	return sometimes(p, rng, Verdict{Hold: depth})
}

func sometimes(p float64, rng *rand.Rand, v Verdict) Rule {
	return func(*Message) Verdict {
		if rng.Float64() < p {
			return v
		}
		return Verdict{}
	}
}

// Corrupt flips one bit of a message's Data with probability p, unless it has none.
func Corrupt(p float64, rng *rand.Rand) Rule {
	return func(m *Message) Verdict {
		if rng.Float64() < p && len(m.Data) > 0 {
			m.Data[rng.IntN(len(m.Data))] ^= 1 << rng.IntN(8)
		}
		return Verdict{}
	}
}

// Truncate takes one or more bytes off the end of a message's Data with probability p, unless it has none.
func Truncate(p float64, rng *rand.Rand) Rule {
	return func(m *Message) Verdict {
		if rng.Float64() < p && len(m.Data) > 0 {
			m.Data = m.Data[:rng.IntN(len(m.Data))]
		}
		return Verdict{}
	}
}

// Chain combines several rules into one. They see each message in turn, as [Interceptor.SetRules] describes.
func Chain(rules ...Rule) Rule {
	return func(m *Message) (v Verdict) {
		for _, r := range rules {
			w := r(m)
			if w.Drop {
				return w
			}
			v.Copies += max(0, w.Copies)
			v.Hold = max(v.Hold, w.Hold)
		}
		return v
	}
}

// Only applies the rules to messages for which match returns true. Other messages pass.
func Only(match func(*Message) bool, rules ...Rule) Rule {
	chain := Chain(rules...)
	return func(m *Message) Verdict {
		if !match(m) {
			return Verdict{}
		}
		return chain(m)
	}
}

// To matches, for [Only], the messages of a direction.
func To(dir Direction) func(*Message) bool {
	return func(m *Message) bool { return dir.includes(m.Dir) }
}

// HasPrefix matches, for [Only], the messages with Data that begins with prefix.
func HasPrefix(prefix ...byte) func(*Message) bool {
	return func(m *Message) bool { return bytes.HasPrefix(m.Data, prefix) }
}
