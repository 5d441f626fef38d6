package object

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vmihailenco/msgpack/v5"

	"github.com/natsstream/stream/internal/race"
)

var codecs = map[string]Codec{"json": JSON, "msgpack": MsgPack}

// arrayOptions is an object whose encoding changes the encoder's options.
type arrayOptions struct{}

func (arrayOptions) EncodeMsgpack(e *msgpack.Encoder) error {
	e.UseArrayEncodedStructs(true)
	e.UseCompactInts(true)
	e.UseCompactFloats(true)
	e.SetSortMapKeys(true)
	e.SetOmitEmpty(true)
	e.SetCustomStructTag("other")
	return e.EncodeInt(1)
}

// An encoder serves one object after the other. What one sets is not the next one's.
func TestEncoderOptionsEndWithObject(t *testing.T) {
	object := struct {
		X     int `other:"Y"`
		Empty string
		Float float64
	}{X: 1, Float: 2}
	want, err := msgpack.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	e := newEncoder()
	for round := range 2 {
		if got, err := e.Encode(object, MsgPack, nil); err != nil || !bytes.Equal(got, want) {
			t.Errorf("round %d: %x, %v; want %x", round, got, err, want)
		}
		if _, err := e.Encode(arrayOptions{}, MsgPack, nil); err != nil {
			t.Error(err)
		}
	}
}

// What does not fit into the buffer given is moved to the encoder's own, however it is cut.
func TestEncoderSpills(t *testing.T) {
	v := map[string]any{"text": strings.Repeat("x", 500), "bytes": make([]byte, 300), "raw": msgpack.RawMessage("\xa3abc"), "n": int64(1 << 40)}
	for name, codec := range codecs {
		e := newEncoder()
		whole := len(encoded(t, v, codec))
		for room := range whole + 2 {
			dst := make([]byte, 0, room)
			b, err := e.Encode(v, codec, dst)
			if err != nil || len(b) != whole || e.Spilled() != (room < whole) {
				if codec == JSON && room == whole && err == nil { // encoding/json wrote a newline as well
					continue
				}
				t.Fatalf("%s: %d bytes with room for %d, spilled %v, %v; want %d", name, len(b), room, e.Spilled(), err, whole)
			}
			if !e.Spilled() && &b[0] != &dst[:1][0] {
				t.Fatalf("%s: not in the buffer given, and not spilled", name)
			}
			var got map[string]any
			if err := Decode(b, codec, &got); err != nil || got["text"] != v["text"] {
				t.Fatalf("%s: %v, %v", name, got, err)
			}
		}
	}
}

// Encoding a plain object takes no memory of its own, and decoding one takes what it is made of.
func TestPlainObjectsAllocateNothing(t *testing.T) {
	type object struct {
		ID    int     `json:"id"`
		Rate  float64 `json:"rate"`
		Text  string  `json:"text"`
		Inner *struct{ A, B int8 }
	}
	var v, got object
	v = object{1, 2.5, "text", &struct{ A, B int8 }{1, 2}}
	e, buf := newEncoder(), make([]byte, 0, 1000)
	rec := bytes.Clone(encoded(t, &v, MsgPack))
	for what, f := range map[string]func() error{
		"encode": func() error { _, err := e.Encode(&v, MsgPack, buf); return err },
		"decode": func() error { return Decode(rec, MsgPack, &got) },
	} {
		want := map[string]float64{"encode": 0, "decode": 1}[what] // the text
		if n := testing.AllocsPerRun(1000, func() {
			if err := f(); err != nil {
				t.Fatal(err)
			}
		}); n > want && !race.Enabled {
			t.Errorf("%s: %v allocations, want %v", what, n, want)
		}
	}
}

// Decoding into a variable that holds an earlier record does what encoding/json does, whatever the variable holds.
func TestDecodeIntoUsedVariable(t *testing.T) {
	type inner struct {
		A, B int
		P    *int
	}
	type object struct {
		Any    any
		Anys   []any
		Map    map[string]any
		Ints   map[string]int
		Maps   map[string]map[string]int
		Bytes  []byte
		List   []inner
		Lists  [][]int
		Ptr    *inner
		Fixed  [3]int
		Named  error
		Nested inner
		Text   string
		N      int
	}
	five := 5
	for name, records := range map[string][]any{
		"any of other types":   {map[string]any{"Any": "a"}, map[string]any{"Any": []any{1.5}}, map[string]any{"Any": map[string]any{"x": "y"}}, map[string]any{"Any": nil}, map[string]any{"Any": true}},
		"lists of any":         {map[string]any{"Anys": []any{"a", 1.5}}, map[string]any{"Anys": []any{2.5}}, map[string]any{"Anys": []any{map[string]any{"k": "v"}, "b", "c"}}, map[string]any{"Anys": []any{}}, map[string]any{"Anys": nil}},
		"maps of any":          {map[string]any{"Map": map[string]any{"a": 1.5}}, map[string]any{"Map": map[string]any{"b": "x"}}, map[string]any{"Map": map[string]any{"a": []any{}}}, map[string]any{"Map": map[string]any{}}, map[string]any{"Map": nil}},
		"maps":                 {map[string]any{"Ints": map[string]int{"a": 1}}, map[string]any{"Ints": map[string]int{"b": 2}}, map[string]any{"Maps": map[string]any{"x": map[string]int{"a": 1}}}, map[string]any{"Maps": map[string]any{"x": map[string]int{"b": 1}}}},
		"bytes":                {map[string]any{"Bytes": []byte("long one")}, map[string]any{"Bytes": []byte("short")}, map[string]any{"Bytes": []byte{}}, map[string]any{"Bytes": nil}},
		"lists":                {map[string]any{"List": []inner{{1, 2, &five}, {3, 4, nil}}}, map[string]any{"List": []any{map[string]int{"A": 9}}}, map[string]any{"List": []any{map[string]int{"B": 8}, map[string]int{}, map[string]int{}}}, map[string]any{"Lists": [][]int{{1, 2, 3}, {4}}}, map[string]any{"Lists": [][]int{{5}}}},
		"pointers":             {map[string]any{"Ptr": map[string]any{"A": 1, "P": 5}}, map[string]any{"Ptr": map[string]any{"B": 2, "P": 6}}, map[string]any{"Ptr": map[string]any{"P": nil}}, map[string]any{"Ptr": nil}},
		"arrays":               {map[string]any{"Fixed": []int{1, 2, 3}}, map[string]any{"Fixed": []int{4}}, map[string]any{"Fixed": []int{1, 2, 3, 4, 5}}, map[string]any{"Fixed": []int{}}, map[string]any{"Fixed": nil}},
		"fields that are gone": {map[string]any{"Nested": map[string]int{"A": 1, "B": 2}, "Text": "a", "N": 3}, map[string]any{"Nested": map[string]int{"A": 5}}, map[string]any{"Nested": nil, "Text": nil, "N": nil}, nil, map[string]any{}},
		"other case":           {map[string]any{"TEXT": "a", "n": 3, "unknown": []any{map[string]any{"x": 1}}}},
	} {
		var want object
		got := map[string]*object{"json": {}, "msgpack": {}}
		var kept, keptWant []object // copies, as a program keeps them
		for i, v := range records {
			want.Bytes = bytes.Clone(want.Bytes) // encoding/json of Go 1.27 would overwrite those that were kept
			if err := json.Unmarshal(encoded(t, v, JSON), &want); err != nil {
				t.Fatalf("%s, record %d: %v", name, i, err)
			}
			for codecName, codec := range codecs {
				if err := Decode(encoded(t, v, codec), codec, got[codecName]); err != nil {
					t.Errorf("%s, %s, record %d: %v", name, codecName, i, err)
				}
				if !reflect.DeepEqual(got[codecName], &want) {
					t.Errorf("%s, %s, record %d: %+v, want %+v", name, codecName, i, got[codecName], want)
				}
			}
			kept, keptWant = append(kept, *got["msgpack"], *got["json"]), append(keptWant, want, want)
			if !reflect.DeepEqual(kept, keptWant) {
				t.Errorf("%s: record %d changed what was kept: %+v, want %+v", name, i, kept, keptWant)
			}
		}
	}
	for name, target := range map[string]func() any{
		"any":               func() any { return new(any) },
		"any with a value":  func() any { var v any = 5; return &v },
		"any with a map":    func() any { var v any = map[string]any{"old": 1}; return &v },
		"any with a struct": func() any { var v any = inner{1, 2, nil}; return &v },
		"any with a target": func() any { var v any = &inner{1, 2, nil}; return &v },
		"any with a nil":    func() any { var v any = (*inner)(nil); return &v },
		"pointer to nil":    func() any { return new(*inner) },
		"pointers":          func() any { p := &inner{1, 2, nil}; return &p },
		"map with entries":  func() any { return &map[string]any{"old": "x", "A": "y"} },
	} {
		for _, v := range []any{map[string]any{"A": 7.5}, map[string]any{"A": nil}, nil} {
			want, got := target(), target()
			errJSON := json.Unmarshal(encoded(t, v, JSON), want)
			err := Decode(encoded(t, v, MsgPack), MsgPack, got)
			if (err == nil) != (errJSON == nil) || err == nil && !reflect.DeepEqual(got, want) {
				t.Errorf("%v into %s: %v, %v; want %v, %v", v, name, got, err, want, errJSON)
			}
		}
	}
}

// A target that points to itself harms nobody. Versions of Go differ in whether it is an error.
func TestDecodeIntoPointerToItselfReturns(t *testing.T) {
	for _, codec := range codecs {
		for _, record := range []any{map[string]any{"A": 7.5}, nil} {
			var v any
			v = &v
			_ = Decode(encoded(t, record, codec), codec, v)
			_ = Decode(encoded(t, record, codec), codec, &v)
		}
	}
}

// A record that is kept shares no memory with the next one, nor with the bytes it came in.
func TestKeptBytesStay(t *testing.T) {
	type object struct {
		Bytes []byte
		Any   any
		Text  string
		Raw   msgpack.RawMessage
		IP    net.IP
	}
	for name, codec := range codecs {
		var v object
		var kept []object
		for i := range 5 {
			c := byte('0' + i)
			o := object{Bytes: []byte{c}, Any: string(c), Text: string(c), Raw: msgpack.RawMessage{c}, IP: net.IPv4(c, c, c, c)}
			rec := bytes.Clone(encoded(t, o, codec))
			if err := Decode(rec, codec, &v); err != nil {
				t.Fatal(err)
			}
			for i := range rec {
				rec[i] = 0xff
			}
			kept = append(kept, v)
		}
		for i, v := range kept {
			c := string(byte('0' + i))
			if string(v.Bytes) != c || v.Any != c || v.Text != c || string(v.Raw) != c || v.IP[len(v.IP)-1] != c[0] {
				t.Errorf("%s: record %d is %+v now", name, i, v)
			}
		}
	}
	for name, codec := range codecs {
		var top []byte
		var nested struct{ A [2]struct{ B []byte } }
		var all [][]byte
		for i := range 3 {
			if err := Decode(encoded(t, []byte{byte(i)}, codec), codec, &top); err != nil {
				t.Fatal(err)
			}
			record := map[string]any{"A": []any{nil, map[string]any{"B": []byte{byte(i)}}}}
			if err := Decode(encoded(t, record, codec), codec, &nested); err != nil {
				t.Fatal(err)
			}
			all = append(all, top, nested.A[1].B)
		}
		if !bytes.Equal(bytes.Join(all, nil), []byte{0, 0, 1, 1, 2, 2}) {
			t.Errorf("%s: %v", name, all)
		}
	}
}

// multi is written as several objects in a row, which only its own method can read.
type multi struct{ A, B int }

func (m *multi) EncodeMsgpack(e *msgpack.Encoder) error { return e.EncodeMulti(m.A, m.B) }
func (m *multi) DecodeMsgpack(d *msgpack.Decoder) error { return d.DecodeMulti(&m.A, &m.B) }

// A record is one object. What follows it, such as the rest of a text in another encoding, is an error.
func TestRestOfRecordIsAnError(t *testing.T) {
	for _, rec := range []string{`{"a":1}`, `[1]`, "\x01\x01", "\x80\xc0", "\xa1aa", "\xc0\xc1", "123", "\x91\x01 "} {
		for _, v := range []any{new(any), new(int), new(string), new(map[string]any), new([]any), new(struct{ A int }), new(*int), new(bool), new([]byte)} {
			if err := Decode([]byte(rec), MsgPack, v); err == nil {
				t.Errorf("%q was decoded as %v", rec, reflect.ValueOf(v).Elem())
			}
		}
	}
	for _, v := range []any{multi{1, 2}, &multi{3, 4}, struct{ M multi }{multi{5, 6}}, []multi{{1, 2}, {3, 4}}} {
		rec := encoded(t, v, MsgPack)
		got := reflect.New(reflect.TypeOf(v))
		if err := Decode(rec, MsgPack, got.Interface()); err != nil || !reflect.DeepEqual(got.Elem().Interface(), v) {
			t.Errorf("%T: %+v, %v", v, got.Elem(), err)
		}
		if err := Decode(append(bytes.Clone(rec), 1), MsgPack, reflect.New(reflect.TypeOf(v)).Interface()); err == nil {
			t.Errorf("%T: a byte more is no error", v)
		}
	}
}

func TestDecodeNeedsATarget(t *testing.T) {
	for name, codec := range codecs {
		for _, v := range []any{nil, 5, (*int)(nil), struct{}{}, map[string]any{}} {
			if err := Decode(encoded(t, 1, codec), codec, v); err == nil {
				t.Errorf("%s: decoded into %#v", name, v)
			}
		}
	}
}

type (
	list    struct{ Next *list }
	tree    struct{ Kids []tree }
	mapped  map[string]mapped
	sliced  []sliced
	pointed *pointed
	mutualA struct{ B *mutualB }
	mutualB struct{ A any }
	holder  struct {
		Name string
		L    *list `json:"l,omitempty"`
	}
)

// methodic is a list whose method hands the rest to the encoder of the package.
type methodic struct{ Next *methodic }

func (m *methodic) EncodeMsgpack(e *msgpack.Encoder) error { return e.EncodeMulti([]int{}, m.Next) }

// cycles are values that contain themselves.
func cycles() map[string]any {
	l := new(list)
	l.Next = l
	k := tree{make([]tree, 1)}
	k.Kids[0] = k
	m := mapped{}
	m["x"] = m
	s := make(sliced, 1)
	s[0] = s
	var p pointed
	p = &p
	a := []any{nil}
	a[0] = a
	am := map[string]any{}
	am["x"] = am
	var i any
	i = &i
	mu := &mutualA{new(mutualB)}
	mu.B.A = mu
	anyMap := map[any]any{}
	anyMap[1] = anyMap
	return map[string]any{
		"list": l, "tree": k, "map": m, "slice": s, "pointer": p, "anys": a, "any map": am, "interface": i, "mutual": mu,
		"within": holder{"x", l}, "within any": map[string]any{"a": []any{holder{"x", l}}}, "map of any": anyMap,
	}
}

// A value with a cycle is an error at its writer. The process lives.
func TestCyclesAreErrors(t *testing.T) {
	values := cycles()
	for name, codec := range codecs {
		for what, v := range values {
			if _, err := newEncoder().Encode(v, codec, nil); err == nil {
				t.Errorf("%s: a %s with a cycle was encoded", name, what)
			}
		}
	}
	m := new(methodic)
	m.Next = m
	if _, err := newEncoder().Encode(m, MsgPack, nil); err == nil {
		t.Error("a cycle through a method was encoded")
	}
}

// nested returns values of n levels, by the way they are nested.
func nested(n int) map[string]any {
	var l *list
	var k, s, m, a, am = tree{}, sliced{}, mapped{}, any([]any{}), any(map[string]any{})
	p := any(&struct{}{})
	for range n - 1 {
		l = &list{l}
		s = sliced{s}
		m = mapped{"x": m}
		a, am = []any{a}, map[string]any{"x": am}
		p = &struct{ P any }{p}
	}
	for range n/2 - 1 { // a struct and a list each
		k = tree{[]tree{k}}
	}
	return map[string]any{"list": &list{l}, "tree": k, "slice": s, "map": m, "anys": a, "any map": am, "pointers in any": p}
}

// What can be written can be read: the bound of the nesting is the same at both ends, and the writer says so.
func TestDepthIsTheSameAtBothEnds(t *testing.T) {
	for name, codec := range codecs {
		for _, n := range []int{1100, MaxDepth} {
			for what, v := range nested(n) {
				rec, err := newEncoder().Encode(v, codec, nil)
				if err != nil {
					t.Errorf("%s: a %s of %d levels: %v", name, what, n, err)
					continue
				}
				var loose any
				for _, got := range []any{reflect.New(reflect.TypeOf(v)).Interface(), &loose} {
					if err := Decode(rec, codec, got); err != nil {
						t.Errorf("%s: a %s of %d levels was written, and into %T: %v", name, what, n, got, err)
					}
				}
			}
		}
		for _, n := range []int{MaxDepth + 2, 10 * MaxDepth} {
			for what, v := range nested(n) {
				if _, err := newEncoder().Encode(v, codec, nil); !errors.Is(err, errDepth) || len(err.Error()) > 1000 {
					t.Errorf("%s: a %s of %d levels: %.300v", name, what, n, err)
				}
			}
		}
	}
	// So long that its encoding would overflow the stack.
	n := 3_000_000
	if testing.Short() || race.Enabled {
		n /= 10
	}
	var l *list
	for range n {
		l = &list{l}
	}
	for name, codec := range codecs {
		if _, err := newEncoder().Encode(l, codec, nil); !errors.Is(err, errDepth) {
			t.Errorf("%s: a list of %d: %.300v", name, n, err)
		}
	}
	// What a method writes counts.
	deep := strings.Repeat("[", MaxDepth) + strings.Repeat("]", MaxDepth)
	if _, err := newEncoder().Encode([]json.RawMessage{json.RawMessage(deep)}, JSON, nil); err == nil {
		t.Error("json: a method nests too deeply")
	}
	if _, err := newEncoder().Encode(json.RawMessage(deep), JSON, nil); err != nil {
		t.Error(err)
	}
	if _, err := newEncoder().Encode([]any{msgpack.RawMessage(strings.Repeat("\x91", MaxDepth) + "\xc0")}, MsgPack, nil); err == nil {
		t.Error("msgpack: a method nests too deeply")
	}
}

// A value that is wide, or met twice, has no cycle.
func TestSharedValuesAreNoCycles(t *testing.T) {
	shared := &list{new(list)}
	wide := make([]any, 100_000)
	for i := range wide {
		wide[i] = map[string]any{"l": shared}
	}
	for name, codec := range codecs {
		for _, v := range []any{wide, tree{make([]tree, 50_000)}, []*list{shared, shared, shared}} {
			rec, err := newEncoder().Encode(v, codec, nil)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			var got any
			if err := Decode(rec, codec, &got); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

type noReceiver struct{}

func (noReceiver) MarshalBinary() ([]byte, error) { return nil, nil }

type valueText struct{}

func (valueText) MarshalText() ([]byte, error)  { return []byte("text"), nil }
func (*valueText) UnmarshalText(b []byte) error { return nil }

// Nothing but a method of the value itself makes an encoder panic.
func TestEncodersDoNotPanic(t *testing.T) {
	type binary interface{ MarshalBinary() ([]byte, error) }
	type text interface{ MarshalText() ([]byte, error) }
	type unexported struct{ c chan int }
	encodes := map[string]any{
		"uintptr": uintptr(1), "uintptrs": []uintptr{1}, "nil in an interface": struct{ B binary }{(*noReceiver)(nil)},
		"nil pointers": []any{(*noReceiver)(nil), (*int)(nil), (*valueText)(nil), (*time.Time)(nil), (**int)(nil)},
		"nil values":   []any{[]int(nil), map[string]int(nil), map[any]any(nil), error(nil)}, "nil interface": struct{ T text }{},
		"nil texts": map[string]*valueText{"a": nil}, "intern": struct {
			N int `msgpack:",intern"`
		}{1}, "unexported": unexported{make(chan int)}, "empty": struct{}{}, "bytes of a kind": [3]kind{1, 2, 3}, "slice of a kind": []kind{1}, "no address": [2]byte{1, 2},
		"map of arrays": map[[2]byte][2]byte{{1, 2}: {3, 4}}, "zero time": time.Time{}, "times": map[time.Time]time.Time{{}: {}},
	}
	fails := map[string]any{
		"channel": make(chan int), "function": func() {}, "complex": 1i, "channel within": []any{map[string]any{"a": make(chan int)}},
		"function field": struct{ F func() }{func() {}}, "unsafe": struct{ C complex64 }{},
	}
	for name, v := range encodes {
		var got any
		if rec, err := newEncoder().Encode(v, MsgPack, nil); err != nil {
			t.Errorf("%s: %v", name, err)
		} else if err := Decode(rec, MsgPack, &got); err != nil {
			t.Errorf("%s: %x: %v", name, rec, err)
		}
	}
	for name, v := range fails {
		for codecName, codec := range codecs {
			if rec, err := newEncoder().Encode(v, codec, nil); err == nil {
				t.Errorf("%s, %s: encoded as %x", codecName, name, rec)
			}
		}
	}
}

type kind byte

// message stands for what protoc makes: a oneof is an interface that no decoder can fill.
type message struct {
	Name  string
	Oneof isOneof
}

type isOneof interface{ isOneof() }

type oneofA struct{ A int }

func (oneofA) isOneof()            {}
func (*message) ProtoReflect() any { return nil }

// encodesItself is a message that brings its own encodings.
type encodesItself struct{ message }

func (*encodesItself) MarshalJSON() ([]byte, error)           { return []byte(`"x"`), nil }
func (*encodesItself) EncodeMsgpack(e *msgpack.Encoder) error { return e.EncodeString("x") }

// A Protocol Buffers message is refused by its writer, wherever it stands, and nil ones are none.
func TestProtobufMessagesAreRefused(t *testing.T) {
	m := &message{"x", oneofA{1}}
	for name, codec := range codecs {
		for what, v := range map[string]any{
			"message": m, "value": *m, "field": struct{ M *message }{m}, "list": []*message{nil, m}, "map": map[string]*message{"a": m},
			"any": []any{m}, "deep": map[string]any{"a": struct{ A any }{[]message{*m}}}, "embedded": struct{ *message }{m},
		} {
			if _, err := newEncoder().Encode(v, codec, nil); err == nil || !strings.Contains(err.Error(), "proto.Marshal") {
				t.Errorf("%s, %s: %v", name, what, err)
			}
		}
		for _, v := range []any{(*message)(nil), struct{ M *message }{}, []*message{nil}, &encodesItself{}} {
			if _, err := newEncoder().Encode(v, codec, nil); err != nil {
				t.Errorf("%s, %T: %v", name, v, err)
			}
		}
	}
}

type onlyJSON struct{ n int }

func (o onlyJSON) MarshalJSON() ([]byte, error)  { return json.Marshal(o.n) }
func (o *onlyJSON) UnmarshalJSON(b []byte) error { return json.Unmarshal(b, &o.n) }

type jsonAndFields struct{ N int }

func (o jsonAndFields) MarshalJSON() ([]byte, error) { return json.Marshal(o.N) }

// A type that only JSON can see into would lose its value.
func TestValuesThatOnlyJSONSeesAreRefused(t *testing.T) {
	for _, v := range []any{onlyJSON{5}, &onlyJSON{5}, []any{onlyJSON{5}}, struct{ O onlyJSON }{onlyJSON{5}}} {
		if rec, err := newEncoder().Encode(v, MsgPack, nil); err == nil || !strings.Contains(err.Error(), "MarshalBinary") {
			t.Errorf("%T became %x, %v", v, rec, err)
		}
		if _, err := newEncoder().Encode(v, JSON, nil); err != nil {
			t.Error(err)
		}
	}
	var got jsonAndFields
	if err := Decode(encoded(t, jsonAndFields{5}, MsgPack), MsgPack, &got); err != nil || got.N != 5 {
		t.Errorf("%v, %v", got, err)
	}
}

// pointerText has its methods on the pointer.
type pointerText struct{ s string }

func (p *pointerText) MarshalText() ([]byte, error) { return []byte(p.s), nil }
func (p *pointerText) UnmarshalText(b []byte) error { p.s = string(b); return nil }

// raw writes itself as MessagePack.
type raw struct{ n byte }

func (r raw) MarshalMsgpack() ([]byte, error)  { return []byte{r.n}, nil }
func (r *raw) UnmarshalMsgpack(b []byte) error { r.n = b[0]; return nil }

// Methods decide the form of a value, wherever it stands.
func TestMethodsDecideTheForm(t *testing.T) {
	type object struct {
		Text    pointerText
		PText   *pointerText
		Texts   []pointerText
		ByText  map[string]pointerText
		Raw     raw
		Raws    map[string]raw
		Int     *big.Int
		Addr    netip.Addr
		URL     *url.URL
		Keys    map[netip.Addr]int
		Message msgpack.RawMessage
		Multi   multi
		When    time.Time
		None    *pointerText
	}
	u, err := url.Parse("nats://host/path")
	if err != nil {
		t.Fatal(err)
	}
	v := object{
		pointerText{"a"}, &pointerText{"b"}, []pointerText{{"c"}}, map[string]pointerText{"k": {"d"}}, raw{1}, map[string]raw{"k": {2}},
		big.NewInt(1 << 60), netip.MustParseAddr("10.0.0.1"), u, map[netip.Addr]int{netip.MustParseAddr("::1"): 1}, msgpack.RawMessage{0x91, 1},
		multi{1, 2}, time.Unix(5, 6).UTC(), nil,
	}
	for _, v := range []any{v, &v, []object{v}, map[string]object{"x": v}, []any{v}} {
		rec := encoded(t, v, MsgPack)
		if _, loose := v.([]any); loose {
			continue
		}
		got := reflect.New(reflect.TypeOf(v))
		if err := Decode(rec, MsgPack, got.Interface()); err != nil {
			t.Errorf("%T: %v", v, err)
			continue
		}
		if a, b := asJSON(t, got.Elem().Interface()), asJSON(t, v); a != b {
			t.Errorf("%T: %s, want %s", v, a, b)
		}
	}
}

// broken is a type whose method writes bytes that are no object.
type broken []byte

func (b broken) EncodeMsgpack(e *msgpack.Encoder) error {
	_, err := e.Writer().Write(b)
	return err
}

// What a method writes and no reader takes is an error at the writer.
func TestBrokenMethodsAreErrorsAtTheWriter(t *testing.T) {
	for _, b := range []broken{{}, {0xc1}, {0x91}, {0xa5, 'x'}, {0xdd, 0xff, 0xff, 0xff, 0xff}} {
		for _, v := range []any{b, []any{b}, map[string]any{"x": b}} {
			if rec, err := newEncoder().Encode(v, MsgPack, nil); err == nil {
				t.Errorf("%T with %x became %x", v, []byte(b), rec)
			}
		}
	}
}

// failing is a type whose methods fail.
type failing struct{ err error }

func (f failing) EncodeMsgpack(*msgpack.Encoder) error  { return f.err }
func (f failing) MarshalJSON() ([]byte, error)          { return nil, f.err }
func (f *failing) DecodeMsgpack(*msgpack.Decoder) error { return errFailing }
func (f *failing) UnmarshalJSON([]byte) error           { return errFailing }

var errFailing = errors.New("cannot be decoded")

// panics is a type whose methods take what they get at its word.
type panics struct{}

func (panics) MarshalBinary() ([]byte, error)  { return nil, nil }
func (*panics) UnmarshalBinary(b []byte) error { _ = b[7]; return nil }

// A method that panics on the bytes of a peer fails for that record alone.
func TestPanicsOfDecodingMethodsAreErrors(t *testing.T) {
	var v struct{ P panics }
	if err := Decode([]byte("\x81\xa1P\xa1x"), MsgPack, &v); !errors.Is(err, errPanic) {
		t.Error(err)
	}
	if err := Decode([]byte("\x81\xa1P\xa8xxxxxxxx"), MsgPack, &v); err != nil {
		t.Error(err)
	}
}

// An error of a method is found in what the encoder and the decoder return, with the place of the value.
func TestErrorsOfMethodsAreWrapped(t *testing.T) {
	failure := errors.New("cannot")
	v := struct{ Outer struct{ Inner failing } }{}
	v.Outer.Inner.err = failure
	for name, codec := range codecs {
		if _, err := newEncoder().Encode(v, codec, nil); !errors.Is(err, failure) || codec == MsgPack && !strings.Contains(err.Error(), "Outer.Inner") {
			t.Errorf("%s: %v", name, err)
		}
		rec := encoded(t, map[string]any{"Outer": map[string]any{"Inner": 1}}, codec)
		if err := Decode(rec, codec, &v); !errors.Is(err, errFailing) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Maps with keys that are no strings can be decoded without knowing their type.
func TestMapsOfOtherKeysIntoAny(t *testing.T) {
	for _, c := range []struct{ in, want any }{
		{map[int]string{1: "a"}, map[any]any{int8(1): "a"}},
		{map[any]any{"a": true, true: nil}, map[any]any{"a": true, true: nil}},
		{map[any]any{"a": true}, map[string]any{"a": true}},
		{map[any]any{nil: 1.5}, map[any]any{nil: 1.5}},
		{map[[2]byte]int{{'a', 'b'}: 1}, map[string]any{"ab": int8(1)}},
	} {
		var got any
		if err := Decode(encoded(t, c.in, MsgPack), MsgPack, &got); err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%v: %#v, %v; want %#v", c.in, got, err, c.want)
		}
	}
}

// allocated returns how many bytes f allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// An object of which nothing is known takes at most looseMemory bytes for each byte of its record, as the documentation
// of RecvObject says. An announcement that the record does not keep takes less.
func TestMemoryOfLooseObjects(t *testing.T) {
	const size = 1 << 20
	const looseMemory, looseJSON = 160, 80
	array := func(elem string) []byte {
		n := size / len(elem)
		return append([]byte{0xdd, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}, strings.Repeat(elem, n)...)
	}
	for name, rec := range map[string][]byte{
		"maps of one": array("\x81\xa0\xc0"), "empty maps": array("\x80"), "empty lists": array("\x90"), "lists of one": array("\x91\xc0"),
		"numbers": array("\x01"), "nils": array("\xc0"), "texts": array("\xa1x"), "mixed keys": array("\x81\x01\xc0"), "shorts": array("\xd1\x01\x01"),
		"two entries": array("\x82\xa1a\xc0\xa1b\xc0"), "nine entries": array("\x89" + strings.Repeat("\xa1a\xc0", 9)),
	} {
		var v any
		n := allocated(func() {
			if err := Decode(rec, MsgPack, &v); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
		t.Logf("%s: %d bytes for each", name, n/uint64(len(rec)))
		if n > looseMemory*uint64(len(rec)) {
			t.Errorf("%s: %d bytes for a record of %d", name, n, len(rec))
		}
	}
	for name, elem := range map[string]string{"maps of one": `{"":0},`, "empty maps": "{},", "empty lists": "[],", "lists of one": "[0],", "numbers": "0,"} {
		rec := []byte("[" + strings.Repeat(elem, size/len(elem)) + "0]")
		var v any
		n := allocated(func() {
			if err := Decode(rec, JSON, &v); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
		t.Logf("JSON, %s: %d bytes for each", name, n/uint64(len(rec)))
		if n > looseJSON*uint64(len(rec)) {
			t.Errorf("JSON, %s: %d bytes for a record of %d", name, n, len(rec))
		}
	}
	for name, head := range map[string]string{"arrays": "\xdd\x00\x08\x00\x00", "maps": "\xdf\x00\x04\x00\x00", "maps of maps": "\xdf\x00\x04\x00\x00\xa1x"} {
		rec := []byte(strings.Repeat(head, size/len(head)/2))
		rec = append(rec, make([]byte, size)...)
		for _, v := range []any{new(any), new([]any), new(map[string]any), new(sliced), new(mapped), new([][]any)} {
			n := allocated(func() {
				if err := Decode(rec, MsgPack, v); err == nil {
					t.Errorf("%s: decoded", name)
				}
			})
			if n > looseMemory*uint64(len(rec)) {
				t.Errorf("%s: %d bytes for a record of %d that is broken", name, n, len(rec))
			}
		}
	}
}

// Plans are made while others use them.
func TestPlansConcurrently(t *testing.T) {
	done := make(chan error)
	for range 8 {
		go func() {
			var first error
			for i := range 20 {
				typ := reflect.StructOf([]reflect.StructField{{Name: fmt.Sprint("F", i), Type: reflect.TypeFor[*list]()}, {Name: "G", Type: reflect.TypeFor[mutualA]()}})
				for _, codec := range codecs {
					b, err := newEncoder().Encode(reflect.New(typ).Interface(), codec, nil)
					if err == nil {
						err = Decode(b, codec, reflect.New(typ).Interface())
					}
					if err != nil {
						first = err
					}
				}
			}
			done <- first
		}()
	}
	for range 8 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
