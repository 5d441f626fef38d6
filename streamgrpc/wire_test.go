package streamgrpc

import (
	"reflect"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"
)

func TestHeadersAreReadAsTheyWereWritten(t *testing.T) {
	for _, c := range []call{
		{md: metadata.MD{}},
		{md: metadata.MD{"a": {"1", "2"}, "raw-bin": {"\x00\xff"}}, timeout: time.Second, codec: "json"},
		{md: metadata.MD{}, message: []byte{}, inline: true},
		{md: metadata.MD{}, message: []byte("m"), inline: true},
	} {
		got, err := parseCall(c.append(nil))
		if err != nil || !reflect.DeepEqual(got, c) {
			t.Errorf("%+v, %v; want %+v", got, err, c)
		}
	}
}

func TestSubjects(t *testing.T) {
	for method, want := range map[string]string{
		"/a.b.Service/Do": "p.a.b.Service.Do",
		"Service/Do":      "p.Service.Do",
		"/S_1/D_2":        "p.S_1.D_2",
		"/S/D.E":          "",
		"/.S/D":           "",
		"/S./D":           "",
		"/a..S/D":         "",
		"/S/$servers":     "",
		"/ü/D":            "",
	} {
		if got, err := subject("p", method); got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v; want %q", method, got, err, want)
		}
	}
}

// Bytes of a stranger lead to an error, or to metadata that can be written again.
func FuzzHeaders(f *testing.F) {
	f.Add((&call{md: metadata.MD{"a": {"1"}}, timeout: 1, codec: "proto", message: []byte("m"), inline: true}).append(nil))
	f.Add([]byte{0x0a, 0x02, 0x0a, 0x00})
	f.Add([]byte{0x0d, 1, 2, 3, 4, 0x13, 0x14})
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := parseCall(b); err == nil {
			again, err := parseCall(c.append(nil))
			if c.inline && len(c.message) == 0 {
				c.message = again.message // nil or empty
			}
			if err != nil || c.timeout >= 0 && !reflect.DeepEqual(again, c) {
				t.Errorf("%+v, %v; want %+v", again, err, c)
			}
		}
		if md, _, err := parseStatus(b); err == nil {
			if again, err := parseHeader(appendMetadata(nil, md)); err != nil || !reflect.DeepEqual(again, md) {
				t.Errorf("%v, %v; want %v", again, err, md)
			}
		}
	})
}
