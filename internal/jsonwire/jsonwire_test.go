package jsonwire_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/natsstream/stream/internal/jsonwire"
)

// original is a message as the original library declares it: the oracle is encoding/json.
type original struct {
	Type       int             `json:"type"`
	Data       []byte          `json:"data,omitempty"`
	CloseError *jsonwire.Close `json:"closeError,omitempty"`
}

func marshal(t *testing.T, m original) []byte {
	t.Helper()
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func randomRecord(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// TestDataIsWhatEncodingJSONWrites, and as large as DataSize says, and comes back.
func TestDataIsWhatEncodingJSONWrites(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	prefix := []byte("prefix")
	for n := range 300 {
		record := randomRecord(r, n)
		want := marshal(t, original{Type: 1, Data: record})
		got := jsonwire.AppendData(prefix, record)
		if !bytes.Equal(got, append(bytes.Clone(prefix), want...)) {
			t.Fatalf("record of %d bytes: %s, want %s", n, got, want)
		}
		if size := jsonwire.DataSize(n); n > 0 && size != len(want) || size < len(want) {
			t.Fatalf("record of %d bytes: DataSize %d, and the message has %d", n, size, len(want))
		}
		back, end, err := jsonwire.Parse(want)
		if err != nil || end != nil || !bytes.Equal(back, record) {
			t.Fatalf("record of %d bytes comes back as %x, %v, %v", n, back, end, err)
		}
	}
}

// TestMaxRecordIsTheLargestThatFits: the message for it fits, and that for one byte more does not.
func TestMaxRecordIsTheLargestThatFits(t *testing.T) {
	for size := range 500 {
		n := jsonwire.MaxRecord(size)
		if n <= 0 {
			if jsonwire.DataSize(1) <= size {
				t.Fatalf("no record fits into %d bytes, and the message for one byte has %d", size, jsonwire.DataSize(1))
			}
			continue
		}
		if jsonwire.DataSize(n) > size || jsonwire.DataSize(n+1) <= size {
			t.Fatalf("%d bytes take a record of %d: messages of %d and %d for it and the next", size, n, jsonwire.DataSize(n), jsonwire.DataSize(n+1))
		}
	}
}

func TestCloseIsWhatEncodingJSONWrites(t *testing.T) {
	for _, c := range []jsonwire.Close{
		{Code: 1000}, {}, {Code: -1, Text: "x"}, {Code: 4000, Text: "no such job"},
		{Code: 5000, Text: "<a> & \"b\" \\ c\nd\x01 \u2028 äß€😀"}, {Code: 5000, Text: "\xff"}, {Text: strings.Repeat("é", 1000)},
	} {
		got := jsonwire.AppendClose([]byte("x"), c)
		if want := marshal(t, original{Type: 2, CloseError: &c}); string(got) != "x"+string(want) {
			t.Errorf("%+v: %s, want %s", c, got, want)
		}
		_, end, err := jsonwire.Parse(got[1:])
		if c.Text = strings.ToValidUTF8(c.Text, "\ufffd"); err != nil || end == nil || *end != c {
			t.Errorf("%+v comes back as %+v, %v", c, end, err)
		}
	}
}

// messages are messages of the original protocol, and input that resembles them.
var messages = []string{
	`{"type":1,"data":"aGVsbG8="}`, `{"type":1}`, `{"type":1,"data":""}`, `{"type":1,"data":null}`,
	`{"type":2,"closeError":{"Code":1000,"Text":""}}`, `{"type":2,"closeError":{"Code":4000,"Text":"\u003cno\u003e \"x\" é"}}`,
	`{"type":2}`, `{"type":2,"closeError":null}`, `{"type":2,"closeError":{}}`, `{"type":3}`, `{}`, `null`, `[1]`, `1e400`, ``,
	` { "data" : "aGVsbG8=" , "type" : 1 } `, `{"TYPE":1,"Data":"aGVsbG8="}`, `{"type":1,"data":"aGVsbG8\u003d"}`,
	`{"type":1,"data":"\/\/\/\/"}`, `{"type":1,"data":[104,105]}`, `{"type":1,"data":"aGVsbG8"}`, `{"type":1,"data":"aGVsbG9="}`,
	`{"type":1,"data":"aGVs bG8="}`, "{\"type\":1,\"data\":\"aGVs\nbG8=\"}", "{\"type\":1,\"data\":\"aGVs\r\nbG8=\"}",
	`{"type":1,"data":"aGVs\nbG8="}`, `{"type":1,"data":"aGVsbG8=","data":"eHh4"}`, `{"type":1,"data":"`, `{"type":1,"data":"}`,
	`{"type":1,"data":""`, `{"type":1,"data":"-_-_"}`, `{"type":1,"data":"aGVsbG8=","closeError":{"Code":1}}`,
	`{"type":2,"data":"aGVsbG8=","closeError":{"code":1000,"tExt":"x"}}`, "hello", "\x00", "<&>\u2028\xff", `{"type":1.0}`,
}

// TestParseReadsWhatEncodingJSONReads compares Parse with encoding/json over messages, and over messages that were
// changed at random.
func TestParseReadsWhatEncodingJSONReads(t *testing.T) {
	rounds := 500
	if testing.Short() {
		rounds /= 10
	}
	r := rand.New(rand.NewPCG(3, 4))
	for _, text := range messages {
		compare(t, []byte(text))
		for range rounds {
			b := []byte(text)
			for range 1 + r.IntN(3) {
				i := r.IntN(len(b) + 1)
				switch c := `"\=,:{}[]Aa0 12` + "\n\xff"; r.IntN(3) {
				case 0:
					b = append(b[:i:i], b[min(i+1, len(b)):]...)
				case 1:
					b = append(b[:i:i], append([]byte{c[r.IntN(len(c))]}, b[i:]...)...)
				default:
					if i < len(b) {
						b[i] = c[r.IntN(len(c))]
					}
				}
			}
			compare(t, b)
		}
	}
}

func compare(t *testing.T, text []byte) {
	t.Helper()
	var want original
	bad := json.Unmarshal(text, &want)
	record, end, err := jsonwire.Parse(bytes.Clone(text))
	switch {
	case bad != nil || want.Type != 1 && want.Type != 2:
		if err == nil || errors.Is(err, jsonwire.ErrNoCloseError) {
			t.Errorf("%q: %q, %v, %v; encoding/json: %+v, %v", text, record, end, err, want, bad)
		}
	case want.Type == 1:
		if err != nil || end != nil || !bytes.Equal(record, want.Data) {
			t.Errorf("%q: %q, %v, %v; want record %q", text, record, end, err, want.Data)
		}
	case want.CloseError == nil:
		if !errors.Is(err, jsonwire.ErrNoCloseError) {
			t.Errorf("%q: %q, %v, %v; want %v", text, record, end, err, jsonwire.ErrNoCloseError)
		}
	default:
		if err != nil || record != nil || end == nil || *end != *want.CloseError {
			t.Errorf("%q: %q, %v, %v; want %+v", text, record, end, err, want.CloseError)
		}
	}
}

// TestParseKeepsTheRecordInTheMessage: it lies in the bytes of the message, and appending to it changes none of them.
func TestParseKeepsTheRecordInTheMessage(t *testing.T) {
	b := jsonwire.AppendData(nil, []byte("hello"))
	record, _, err := jsonwire.Parse(b)
	if err != nil || &record[0] != &b[0] || cap(record) != len(record) {
		t.Fatalf("%q of capacity %d, %v", record, cap(record), err)
	}
}

// TestRecordsDoNotAllocate: neither encoding nor decoding a record allocates.
func TestRecordsDoNotAllocate(t *testing.T) {
	record := make([]byte, 1000)
	buf := make([]byte, 0, jsonwire.DataSize(len(record)))
	if n := testing.AllocsPerRun(1000, func() {
		b := jsonwire.AppendData(buf, record)
		if rec, _, err := jsonwire.Parse(b); err != nil || len(rec) != len(record) {
			t.Fatal(len(rec), err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
