// Package concurrency carries the result of other goroutines' work through a channel: a value, or the error in its
// place. [github.com/natsstream/stream.Client.OpenStream] delivers its records in this form.
package concurrency

import (
	"encoding/json"
	"errors"
)

// ErrNoResult is the error of a nil [AsyncResult]. A receive from a closed channel yields a nil result.
var ErrNoResult = errors.New("concurrency: no result")

// AsyncResult is a value or an error. Its fields are plain; a result must not be changed once it was sent to
// another goroutine, and may be read by any number of them.
//
// Its JSON form is {"value":…} or {"error":"text"}. A result that has both an error and a value other than the zero
// value keeps both.
type AsyncResult[T any] struct {
	Value T
	Err   error
}

// NewAsyncValue returns a result that holds v and no error.
func NewAsyncValue[T any](v T) *AsyncResult[T] {
	return &AsyncResult[T]{Value: v}
}

// NewAsyncError returns a result that holds err and the zero value of T.
func NewAsyncError[T any](err error) *AsyncResult[T] {
	return &AsyncResult[T]{Err: err}
}

// NewAsyncResult returns a result that holds v and err, as a function returned them.
func NewAsyncResult[T any](v T, err error) *AsyncResult[T] {
	return &AsyncResult[T]{Value: v, Err: err}
}

// ValueOrError returns the result's value and error, in the order in which functions return them. For a nil result the
// error is [ErrNoResult].
func (r *AsyncResult[T]) ValueOrError() (T, error) {
	if r == nil {
		var zero T
		return zero, ErrNoResult
	}
	return r.Value, r.Err
}

// MarshalJSON writes the JSON form. The receiver is a value, so that a result inside another value has the same form
// as a pointer to one.
func (r AsyncResult[T]) MarshalJSON() ([]byte, error) {
	if r.Err == nil {
		return json.Marshal(struct {
			Value T `json:"value"`
		}{r.Value})
	}
	return json.Marshal(struct {
		Value T      `json:"value,omitzero"`
		Error string `json:"error"`
	}{r.Value, r.Err.Error()})
}

// UnmarshalJSON reads the JSON form and replaces both fields. An error comes back with its text and without its type.
// On failure the result is left as it was.
func (r *AsyncResult[T]) UnmarshalJSON(b []byte) error {
	// A pointer, because an error with an empty text is an error all the same.
	var form struct {
		Value T       `json:"value"`
		Error *string `json:"error"`
	}
	if err := json.Unmarshal(b, &form); err != nil {
		return err
	}
	r.Value, r.Err = form.Value, nil
	if form.Error != nil {
		r.Err = errors.New(*form.Error)
	}
	return nil
}
