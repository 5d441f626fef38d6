package concurrency_test

import (
	"encoding/json"
	"errors"
	"reflect"
	"testing"

	"github.com/natsstream/stream/concurrency"
)

func TestConstructors(t *testing.T) {
	broken := errors.New("broken")
	for _, tc := range []struct {
		name  string
		in    *concurrency.AsyncResult[string]
		value string
		err   error
	}{
		{"value", concurrency.NewAsyncValue("a"), "a", nil},
		{"error", concurrency.NewAsyncError[string](broken), "", broken},
		{"both", concurrency.NewAsyncResult("a", broken), "a", broken},
		{"neither", concurrency.NewAsyncResult("", nil), "", nil},
		{"nil", nil, "", concurrency.ErrNoResult},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if v, err := tc.in.ValueOrError(); v != tc.value || !errors.Is(err, tc.err) {
				t.Fatalf("ValueOrError() = %q, %v; want %q, %v", v, err, tc.value, tc.err)
			}
		})
	}
}

func TestClosedChannel(t *testing.T) {
	ch := make(chan *concurrency.AsyncResult[int])
	close(ch)
	if v, err := (<-ch).ValueOrError(); v != 0 || err != concurrency.ErrNoResult {
		t.Fatalf("ValueOrError() = %d, %v; want 0, ErrNoResult", v, err)
	}
}

type point struct{ X, Y int }

func TestJSON(t *testing.T) {
	testJSON(t, "string", concurrency.NewAsyncValue("a"), `{"value":"a"}`)
	testJSON(t, "zero", concurrency.NewAsyncValue(0), `{"value":0}`)
	testJSON(t, "bytes", concurrency.NewAsyncValue([]byte("abc")), `{"value":"YWJj"}`)
	testJSON(t, "no bytes", concurrency.NewAsyncValue([]byte(nil)), `{"value":null}`)
	testJSON(t, "struct", concurrency.NewAsyncValue(point{1, 2}), `{"value":{"X":1,"Y":2}}`)
	testJSON(t, "nested", concurrency.NewAsyncValue(*concurrency.NewAsyncError[int](errors.New("in"))), `{"value":{"error":"in"}}`)
	testJSON(t, "error", concurrency.NewAsyncError[point](errors.New("broken")), `{"error":"broken"}`)
	testJSON(t, "error without text", concurrency.NewAsyncError[int](errors.New("")), `{"error":""}`)
	testJSON(t, "value and error", concurrency.NewAsyncResult(3, errors.New("short")), `{"value":3,"error":"short"}`)
	testJSON(t, "empty bytes and error", concurrency.NewAsyncResult([]byte{}, errors.New("x")), `{"value":"","error":"x"}`)
}

func testJSON[T any](t *testing.T, name string, in *concurrency.AsyncResult[T], want string) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		for _, v := range []any{in, *in} {
			if got, err := json.Marshal(v); err != nil || string(got) != want {
				t.Fatalf("Marshal(%T) = %s, %v; want %s", v, got, err, want)
			}
		}
		// What was there before must not shine through.
		out := concurrency.AsyncResult[T]{Err: errors.New("old")}
		if err := json.Unmarshal([]byte(want), &out); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(out.Value, in.Value) {
			t.Errorf("value %#v became %#v", in.Value, out.Value)
		}
		if (in.Err == nil) != (out.Err == nil) || in.Err != nil && in.Err.Error() != out.Err.Error() {
			t.Errorf("error %#v became %#v", in.Err, out.Err)
		}
	})
}

func TestMarshalNil(t *testing.T) {
	var none *concurrency.AsyncResult[int]
	if got, err := json.Marshal(none); err != nil || string(got) != "null" {
		t.Fatalf("Marshal(nil) = %s, %v; want null", got, err)
	}
}

func TestMarshalUnsupported(t *testing.T) {
	if got, err := json.Marshal(concurrency.NewAsyncValue(make(chan int))); err == nil {
		t.Fatalf("Marshal of a channel = %s, want an error", got)
	}
}

func TestUnmarshal(t *testing.T) {
	for _, tc := range []struct {
		in      string
		value   int
		err     string
		invalid bool
	}{
		{in: `{}`},
		{in: `{"value":7,"error":null}`, value: 7},
		{in: `{"error":"e","extra":true}`, err: "e"},
		{in: `{"value":"text"}`, invalid: true},
		{in: `{"error":5}`, invalid: true},
		{in: `[]`, invalid: true},
		{in: `{"value":`, invalid: true},
	} {
		r := concurrency.AsyncResult[int]{Value: -1}
		err := r.UnmarshalJSON([]byte(tc.in))
		switch {
		case tc.invalid && (err == nil || r.Value != -1 || r.Err != nil):
			t.Errorf("%s: got %+v, error %v; want an error and the result untouched", tc.in, r, err)
		case !tc.invalid && err != nil:
			t.Errorf("%s: %v", tc.in, err)
		case !tc.invalid && (r.Value != tc.value || (r.Err != nil) != (tc.err != "") || r.Err != nil && r.Err.Error() != tc.err):
			t.Errorf("%s: got %+v, want value %d and error %q", tc.in, r, tc.value, tc.err)
		}
	}
}
