package object

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/vmihailenco/msgpack/v5"
	"pgregory.net/rapid"
)

// encoded returns what v is as a record.
func encoded(t testing.TB, v any, codec Codec) []byte {
	t.Helper()
	b, err := newEncoder().Encode(v, codec, nil)
	if err != nil {
		t.Fatalf("%T: %v", v, err)
	}
	return b
}

// leaf and node are types of what both codecs carry alike.
type leaf struct {
	Bool   bool
	Int    int
	Int8   int8
	Int16  int16
	Int32  int32
	Int64  int64 `json:"int64"`
	Uint   uint  `json:",omitempty"`
	Uint8  uint8
	Uint16 uint16 `json:"u16,omitempty"`
	Uint32 uint32
	Uint64 uint64 `json:",string"`
	F32    float32
	F64    float64 `msgpack:"F64"`
	Text   string  `json:"text,omitempty"`
	Bytes  []byte  `json:"bytes"`
	Secret string  `json:"-"`
	hidden int
}

type node struct {
	leaf
	*Named
	Inner leaf `json:"inner"`
	List  []leaf
	Names []string
	Fixed [3]int16
	Map   map[string]leaf
	ByInt map[int32]string
	Next  *node
	At    time.Time
	Any   any
	Anys  []any
	Loose map[string]any
}

// Named is embedded by a pointer.
type Named struct {
	Title string
	Text  string // hidden by that of leaf, or the other way round: as encoding/json decides
}

func drawLeaf(t *rapid.T) leaf {
	return leaf{
		Bool: rapid.Bool().Draw(t, "bool"), Int: rapid.Int().Draw(t, "int"), Int8: rapid.Int8().Draw(t, "int8"),
		Int16: rapid.Int16().Draw(t, "int16"), Int32: rapid.Int32().Draw(t, "int32"), Int64: rapid.Int64().Draw(t, "int64"),
		Uint: rapid.Uint().Draw(t, "uint"), Uint8: rapid.Uint8().Draw(t, "uint8"), Uint16: rapid.Uint16().Draw(t, "uint16"),
		Uint32: rapid.Uint32().Draw(t, "uint32"), Uint64: rapid.Uint64().Draw(t, "uint64"),
		F32: rapid.Float32Range(-1e30, 1e30).Draw(t, "f32"), F64: rapid.Float64Range(-1e300, 1e300).Draw(t, "f64"),
		Text:  rapid.StringN(0, 40, 300).Draw(t, "text"),
		Bytes: rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "bytes"), Secret: "secret", hidden: 1,
	}
}

// drawAny draws what an interface may hold, of types that both codecs decode alike.
func drawAny(depth int) *rapid.Generator[any] {
	return rapid.Custom(func(t *rapid.T) any {
		kinds := 6
		if depth == 0 {
			kinds = 4
		}
		switch rapid.IntRange(0, kinds-1).Draw(t, "kind") {
		case 0:
			return nil
		case 1:
			return rapid.Bool().Draw(t, "b")
		case 2:
			return rapid.Float64Range(-1e300, 1e300).Draw(t, "f")
		case 3:
			return rapid.StringN(0, 10, 50).Draw(t, "s")
		case 4:
			return rapid.SliceOfN(drawAny(depth-1), 0, 20).Draw(t, "list")
		}
		return rapid.MapOfN(rapid.StringN(0, 5, 20), drawAny(depth-1), 0, 20).Draw(t, "map")
	})
}

func drawNode(t *rapid.T, depth int) *node {
	n := &node{
		leaf: drawLeaf(t), Inner: drawLeaf(t),
		Names: rapid.SliceOfN(rapid.StringN(0, 5, 20), 0, 20).Draw(t, "names"),
		Fixed: [3]int16{rapid.Int16().Draw(t, "fixed")},
		ByInt: rapid.MapOfN(rapid.Int32(), rapid.StringN(0, 3, 10), 0, 20).Draw(t, "byInt"),
		At:    time.Unix(rapid.Int64Range(-1<<33, 1<<36).Draw(t, "s"), rapid.Int64Range(0, 999_999_999).Draw(t, "ns")).UTC(),
		Any:   drawAny(2).Draw(t, "any"),
		Anys:  rapid.SliceOfN(drawAny(1), 0, 4).Draw(t, "anys"),
		Loose: rapid.MapOfN(rapid.StringN(0, 3, 10), drawAny(1), 0, 4).Draw(t, "loose"),
	}
	if rapid.Bool().Draw(t, "named") {
		n.Named = &Named{Title: rapid.String().Draw(t, "title")}
	}
	for range rapid.IntRange(0, 3).Draw(t, "leaves") {
		n.List = append(n.List, drawLeaf(t))
	}
	for i := range rapid.IntRange(0, 3).Draw(t, "entries") {
		if n.Map == nil {
			n.Map = map[string]leaf{}
		}
		n.Map[fmt.Sprint(i)] = drawLeaf(t)
	}
	if depth > 0 && rapid.Bool().Draw(t, "next") {
		n.Next = drawNode(t, depth-1)
	}
	return n
}

// asJSON is how values are compared: times have no zone there, and nothing is shared.
func asJSON(t interface{ Fatal(...any) }, v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// utc gives the times of n, which MessagePack carries without their zone, the zone of the test.
func utc(n *node) {
	for ; n != nil; n = n.Next {
		n.At = n.At.UTC()
	}
}

// Whatever is written and read again, into a new variable or into one that holds an earlier record, is what
// encoding/json makes of it.
func TestCodecsAgreeOnRandomRecords(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var want, got, viaJSON node
		for range rapid.IntRange(1, 4).Draw(t, "records") {
			v := drawNode(t, 2)
			text, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(text, &want); err != nil {
				t.Fatal(err)
			}
			for codec, into := range map[Codec]*node{JSON: &viaJSON, MsgPack: &got} {
				e := newEncoder()
				b, err := e.Encode(v, codec, make([]byte, 0, rapid.IntRange(0, 4000).Draw(t, "room")))
				if err != nil {
					t.Fatal(err)
				}
				if err := Decode(b, codec, into); err != nil {
					t.Fatalf("codec %v: %v", codec, err)
				}
				utc(into)
				if got, want := asJSON(t, into), asJSON(t, &want); got != want {
					t.Fatalf("codec %v:\n%s\nwant\n%s", codec, got, want)
				}
			}
		}
	})
}

// A record that is cut short or damaged is an error or another value, never a panic.
func TestDamagedRecords(t *testing.T) {
	type object struct {
		N       node
		Bytes   [5]byte
		Kinds   [2]kind
		Slice   []kind
		Texts   map[pointerText]*pointerText
		Raws    []raw
		Multis  []multi
		Message msgpack.RawMessage
		Err     error
		P       **int
	}
	five := 5
	p := &five
	rapid.Check(t, func(t *rapid.T) {
		v := object{
			N: *drawNode(t, 1), Bytes: [5]byte{1, 2, 3}, Kinds: [2]kind{4, 5}, Slice: []kind{6}, Texts: map[pointerText]*pointerText{{"k"}: {"v"}},
			Raws: []raw{{1}}, Multis: []multi{{1, 2}}, Message: msgpack.RawMessage{0x91, 1}, Err: fmt.Errorf("text"), P: &p,
		}
		rec, err := newEncoder().Encode(v, MsgPack, nil)
		if err != nil {
			t.Fatal(err)
		}
		var got object
		if err := Decode(rec, MsgPack, &got); err != nil {
			t.Fatal(err)
		}
		utc(&got.N)
		if a, b := asJSON(t, got.N), asJSON(t, v.N); a != b || got.Bytes != v.Bytes || got.Kinds != v.Kinds || got.Slice[0] != 6 || **got.P != 5 ||
			got.Texts[pointerText{"k"}].s != "v" || got.Multis[0] != v.Multis[0] || got.Err.Error() != "text" {
			t.Fatalf("%+v, want %+v", got, v)
		}
		n := rapid.IntRange(0, len(rec)-1).Draw(t, "cut")
		for _, into := range []any{new(object), new(any)} {
			if err := Decode(rec[:n], MsgPack, into); err == nil || errors.Is(err, errPanic) {
				t.Fatalf("%d bytes of %d are a record, or %v", n, len(rec), err)
			}
		}
		for range rapid.IntRange(1, 5).Draw(t, "damage") {
			rec[rapid.IntRange(0, len(rec)-1).Draw(t, "at")] = rapid.Byte().Draw(t, "byte")
			for _, into := range []any{new(object), &got, new(any)} {
				if err := Decode(rec, MsgPack, into); errors.Is(err, errPanic) {
					t.Fatal(err)
				}
			}
		}
	})
}

// The bytes are those of the msgpack package with json tags, for types that it writes as encoding/json would, and it
// reads them as RecvObject does.
func TestMsgPackMatchesThePackage(t *testing.T) {
	type plain struct {
		A leaf `json:"a"`
		B []leaf
		C map[string]any
		D any
		E time.Time
		F *leaf
	}
	rapid.Check(t, func(t *rapid.T) {
		l := drawLeaf(t)
		v := plain{A: l, B: []leaf{l}, D: drawAny(2).Draw(t, "any"), E: time.Unix(rapid.Int64().Draw(t, "s")>>20, rapid.Int64Range(0, 1e9-1).Draw(t, "ns"))}
		if rapid.Bool().Draw(t, "map") {
			v.C = map[string]any{"one": rapid.Int().Draw(t, "one")}
		}
		var want bytes.Buffer
		enc := msgpack.NewEncoder(&want)
		enc.SetCustomStructTag("json")
		got, err := newEncoder().Encode(v, MsgPack, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := enc.Encode(v); err != nil {
			t.Fatal(err)
		}
		if len(got) != want.Len() || !hasMaps(v.D) && !bytes.Equal(got, want.Bytes()) { // the order within a map is random
			t.Fatalf("%x\nwant\n%x", got, want.Bytes())
		}
		var a, b any
		if err := Decode(got, MsgPack, &a); err != nil {
			t.Fatal(err)
		}
		if err := msgpack.Unmarshal(got, &b); err != nil || !reflect.DeepEqual(a, b) {
			t.Fatalf("%#v\nwant\n%#v, %v", a, b, err)
		}
	})
	for _, v := range msgPackValues() {
		want, err := msgpack.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if got := encoded(t, v, MsgPack); len(got) != len(want) || reflect.ValueOf(v).Kind() != reflect.Map && !bytes.Equal(got, want) {
			t.Errorf("%T: %x, want %x", v, got[:min(len(got), 40)], want[:min(len(want), 40)])
		}
		var a, b any
		errA, errB := Decode(want, MsgPack, &a), msgpack.Unmarshal(want, &b)
		if _, keys := v.(map[int]string); keys { // an error for the package
			errB, b = nil, map[any]any{int8(1): "a"}
		}
		if (errA == nil) != (errB == nil) || !reflect.DeepEqual(a, b) {
			t.Errorf("%T: %#v, %v; want %#v, %v", v, a, errA, b, errB)
		}
	}
}

func hasMaps(v any) bool {
	switch v := v.(type) {
	case map[string]any:
		return true
	case []any:
		for _, v := range v {
			if hasMaps(v) {
				return true
			}
		}
	}
	return false
}

// names returns the names in what JSON or MessagePack made of a value, and how they are nested.
func names(v any) any {
	switch v := v.(type) {
	case map[string]any:
		m := map[string]any{}
		for k, v := range v {
			m[k] = names(v)
		}
		return m
	case []any:
		var s []any
		for _, v := range v {
			s = append(s, names(v))
		}
		return s
	}
	return nil
}

type (
	base     struct{ X, Y int }
	Base     struct{ X, Z int }
	deepBase struct{ Base }
	otherA   struct {
		X int
		T int `json:"t"`
	}
	number   int
	Embedded interface{ Method() }
)

// oneField returns a struct with a field that has this tag.
func oneField(tag reflect.StructTag) any {
	return reflect.New(reflect.StructOf([]reflect.StructField{{Name: "A", Type: reflect.TypeFor[int](), Tag: tag}})).Interface()
}

// The names of a struct's record are the same in both codecs.
func TestNamesAreThoseOfJSON(t *testing.T) {
	for name, v := range map[string]any{
		"plain": struct{ A, b, C int }{1, 2, 3},
		"renamed": struct {
			A int `json:"a"`
		}{},
		"kept back": struct {
			A, B int `json:"-"`
		}{1, 2},
		"named dash": oneField(`json:"-,"`),
		"other options": struct {
			A int `json:"a,string,omitempty,inline"`
		}{1},
		"invalid name": oneField(`json:"a\"b"`),
		"unusual name": struct {
			A int `json:"a b/c.d é"`
		}{},
		"omitempty": struct {
			A int            `json:",omitempty"`
			B []int          `json:",omitempty"`
			C *int           `json:",omitempty"`
			D map[string]int `json:",omitempty"`
			E any            `json:",omitempty"`
			F time.Time      `json:",omitempty"`
			G base           `json:",omitempty"`
			H [0]int         `json:",omitempty"`
			I bool           `json:",omitempty"`
			J float64        `json:",omitempty"`
		}{},
		"omitzero": struct {
			A time.Time  `json:",omitzero"`
			B base       `json:",omitzero"`
			C base       `json:",omitzero"`
			D *time.Time `json:",omitzero"`
			E []int      `json:",omitzero"`
			F []int      `json:",omitzero"`
			G [2]int     `json:"g,omitempty,omitzero"`
		}{C: base{1, 2}, E: []int{}},
		"embedded":             struct{ Base }{},
		"embedded, unexported": struct{ base }{},
		"embedded pointer":     struct{ *Base }{&Base{}},
		"embedded nil":         struct{ *Base }{},
		"embedded with a name": struct {
			Base `json:"base"`
		}{},
		"embedded and kept back": struct {
			Base `json:"-"`
		}{},
		"embedded deeper": struct{ deepBase }{},
		"hidden by the outer": struct {
			Base
			X string
		}{},
		"hidden by each other": struct {
			Base
			base
		}{},
		"hidden by a tag": struct {
			otherA
			T int
		}{},
		"one tagged": struct {
			Base
			A otherA `json:"X"`
		}{},
		"same name twice": reflect.New(reflect.StructOf([]reflect.StructField{
			{Name: "A", Type: reflect.TypeFor[int](), Tag: `json:"x"`}, {Name: "B", Type: reflect.TypeFor[int](), Tag: `json:"x"`},
		})).Interface(),
		"deeper is hidden": struct {
			deepBase
			base
		}{},
		"embedded number": struct{ number }{},
		"embedded exported pointer": struct {
			*otherA
			Base
		}{},
		"embedded interface": struct{ Embedded }{},
		"embedded twice": struct {
			A struct{ Base }
			Base
		}{},
		"nested":   []any{map[string]any{"k": struct{ A []base }{[]base{{}}}}, &base{}},
		"pointers": struct{ A **base }{},
	} {
		var viaJSON, viaMsgPack any
		if err := json.Unmarshal(encoded(t, v, JSON), &viaJSON); err != nil {
			t.Fatal(err)
		}
		if err := Decode(encoded(t, v, MsgPack), MsgPack, &viaMsgPack); err != nil {
			t.Fatal(err)
		}
		if got, want := names(viaMsgPack), names(viaJSON); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
}

// A msgpack tag stands in for the json tag.
func TestMsgPackTagsComeFirst(t *testing.T) {
	v := struct {
		A    int `msgpack:"a" json:"b"`
		B    int `msgpack:"-" json:"c"`
		C    int `msgpack:"d" json:"-"`
		D    int `msgpack:",omitempty" json:"e"`
		Base `msgpack:",noinline" json:""`
	}{A: 1, C: 2}
	var got map[string]any
	if err := Decode(encoded(t, v, MsgPack), MsgPack, &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"a": int8(1), "d": int8(2), "Base": map[string]any{"X": int8(0), "Z": int8(0)}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	type pair struct {
		_msgpack struct{} `msgpack:",as_array"`
		X, Y     int
	}
	list := encoded(t, pair{struct{}{}, 1, 2}, MsgPack)
	var back pair
	if !bytes.Equal(list, []byte{0x92, 1, 2}) || Decode(list, MsgPack, &back) != nil || back.X != 1 || back.Y != 2 {
		t.Errorf("%x, %v", list, back)
	}
	if err := Decode([]byte{0x93, 1, 2, 3}, MsgPack, &back); err == nil {
		t.Error("three elements became a struct of two fields")
	}
	var renamed struct {
		New int `msgpack:"new,alias:old"`
	}
	if err := Decode([]byte("\x81\xa3old\x07"), MsgPack, &renamed); err != nil || renamed.New != 7 {
		t.Errorf("an alias: %v, %v", renamed, err)
	}
}

// numbers are written in all their types.
var numbers = []any{
	0, 1, -1, 127, 128, 255, 256, -128, -129, 32767, 32768, 65535, 65536, -32768, -32769, math.MaxInt32, int64(math.MaxInt32 + 1), math.MinInt32,
	int64(math.MinInt32 - 1), int64(math.MaxUint32), int64(math.MaxUint32 + 1), int64(math.MaxInt64), int64(math.MinInt64), uint64(math.MaxUint64), uint64(math.MaxInt64 + 1),
	int8(-5), int16(-300), int32(-70000), int64(1 << 40), int64(-1 << 40), uint8(200), uint16(60000), uint32(1 << 31), uint64(7), uintptr(9),
	0.0, 1.0, -1.0, 1.5, -0.5, 255.0, 256.0, 1e10, 1e19, 1e20, 1e39, -1e39, 1e300, float32(2), float32(2.5), float32(1 << 24), float32(-7),
	true, "5", nil, []int{1}, map[string]int{"a": 1},
}

// A number that a type cannot hold is an error, wherever it stands, and never another number.
func TestNumbersConvertAsInJSON(t *testing.T) {
	type named int8
	wrap := []func(any) any{
		func(v any) any { return v },
		func(v any) any { return []any{v} },
		func(v any) any { return map[string]any{"F": v} },
	}
	for _, v := range numbers {
		for _, typ := range []reflect.Type{
			reflect.TypeFor[int](), reflect.TypeFor[int8](), reflect.TypeFor[int16](), reflect.TypeFor[int32](), reflect.TypeFor[int64](),
			reflect.TypeFor[uint](), reflect.TypeFor[uint8](), reflect.TypeFor[uint16](), reflect.TypeFor[uint32](), reflect.TypeFor[uint64](),
			reflect.TypeFor[uintptr](), reflect.TypeFor[float32](), reflect.TypeFor[float64](), reflect.TypeFor[named](), reflect.TypeFor[time.Duration](),
			reflect.TypeFor[bool](), reflect.TypeFor[string](),
		} {
			field := reflect.StructOf([]reflect.StructField{{Name: "F", Type: typ}})
			for i, targets := range [][]reflect.Type{
				{typ, reflect.PointerTo(typ)}, {reflect.SliceOf(typ), reflect.ArrayOf(1, typ), reflect.SliceOf(reflect.PointerTo(typ))},
				{reflect.MapOf(reflect.TypeFor[string](), typ), field, reflect.PointerTo(field)},
			} {
				v := wrap[i](v)
				for _, target := range targets {
					want, got := reflect.New(target), reflect.New(target)
					errJSON := json.Unmarshal(encoded(t, v, JSON), want.Interface())
					err := Decode(encoded(t, v, MsgPack), MsgPack, got.Interface())
					switch {
					case (err == nil) != (errJSON == nil):
						t.Errorf("%T %v into %v: %v; JSON: %v", v, v, target, err, errJSON)
					case err == nil && !reflect.DeepEqual(got.Elem().Interface(), want.Elem().Interface()):
						t.Errorf("%T %v into %v: %v, want %v", v, v, target, got.Elem(), want.Elem())
					case err != nil && strings.Contains(err.Error(), "msgpack:"):
						t.Errorf("%v: it does not say what to do", err)
					}
				}
			}
		}
	}
}
