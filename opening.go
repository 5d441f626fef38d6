package stream

import (
	"slices"
	"sync"

	"github.com/nats-io/nats.go"
)

// opening is the request of a stream that is not published yet. It is a copy, because the caller of Open may change its
// own message at once. The goroutine that calls Open makes the copy. Once the session is registered, the outbox owns
// the copy: it publishes the request and releases the memory, which neither nats.go nor the session keeps.
type opening struct {
	msg   nats.Msg
	offer Token
	text  [1]string // the offer as the value of its header
}

var openings = sync.Pool{New: func() any { return &opening{msg: nats.Msg{Header: make(nats.Header)}} }}

// maxOpening is the largest buffer, in bytes, that is kept for the data of later requests.
const maxOpening = 4 << 10

// newOpening returns a copy of msg with an offer.
func newOpening(msg *nats.Msg, offer Token) *opening {
	r := openings.Get().(*opening)
	r.msg.Subject, r.msg.Data = msg.Subject, append(r.msg.Data, msg.Data...)
	for key, values := range msg.Header {
		r.msg.Header[key] = slices.Clone(values)
	}
	if r.text[0] == "" || r.offer != offer {
		r.offer, r.text[0] = offer, string(AppendOffer(nil, offer))
	}
	r.msg.Header[headerOpen] = r.text[:]
	return r
}

// release gives the memory of r back.
func (r *opening) release() {
	clear(r.msg.Header)
	r.msg.Subject, r.msg.Reply, r.msg.Data = "", "", r.msg.Data[:0]
	if cap(r.msg.Data) > maxOpening {
		r.msg.Data = nil
	}
	openings.Put(r)
}

// dropOpening forgets the request of s, which was published or never will be. Called by the outbox.
func (s *session) dropOpening() {
	if r := s.out.request; r != nil {
		s.out.request = nil
		r.release()
	}
}
