package stream_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/vmihailenco/msgpack/v5"

	"github.com/natsstream/stream"
)

func TestObjectsArrive(t *testing.T) {
	type object struct {
		Name string
		N    int
		Raw  []byte
	}
	for _, codec := range []stream.Codec{stream.CodecDefault, stream.JSON, stream.MsgPack} {
		t.Run(codec.String(), func(t *testing.T) {
			p := newPair(t, pairOptions{consumer: stream.ClientParams{Codec: codec}})
			w, s := newWriterStream(t, p)
			sizes := []int{0, 1, 100, 1000, coalesceLimit - 100, coalesceLimit, 100 << 10, singleLimit, 2 * singleLimit}
			p.handlers.Go(func() {
				for i, n := range sizes {
					if size, err := w.WriteObject(object{fmt.Sprint(i), i, testRecord(i, n)}); err != nil || size < n {
						t.Errorf("WriteObject: %d, %v", size, err)
					}
					write(t, w, []byte{0xC1}) // neither JSON nor MessagePack
				}
				closeWriter(t, w)
			})
			for i, n := range sizes {
				var got object
				if err := s.RecvObject(&got); err != nil {
					t.Fatal(err)
				}
				if got.Name != fmt.Sprint(i) || got.N != i || !bytes.Equal(got.Raw, testRecord(i, n)) {
					t.Fatalf("object %d differs: %d bytes", i, len(got.Raw))
				}
				if err := s.RecvObject(&got); err == nil || errors.Is(err, io.EOF) {
					t.Fatalf("a record that is no object: %v", err)
				}
				if s.Context().Err() != nil {
					t.Fatal("a record that does not decode ended the stream")
				}
			}
			if err := s.RecvObject(new(object)); err != io.EOF {
				t.Fatal(err)
			}
		})
	}
}

// A record written as bytes is decoded by the codec that the consumer asked for.
func TestBytesAreDecodedByTheCodecAskedFor(t *testing.T) {
	for _, tt := range []struct {
		codec stream.Codec
		raw   []byte
	}{{stream.JSON, []byte(`"hi"`)}, {stream.MsgPack, []byte("\xa2hi")}, {stream.CodecDefault, []byte("\xa2hi")}} {
		t.Run(tt.codec.String(), func(t *testing.T) {
			w, s := newWriterStream(t, newPair(t, pairOptions{consumer: stream.ClientParams{Codec: tt.codec}}))
			write(t, w, tt.raw)
			closeWriter(t, w)
			var got string
			if err := s.RecvObject(&got); err != nil || got != "hi" {
				t.Errorf("%q, %v", got, err)
			}
			wantEOF(t, s)
		})
	}
}

// eachCodec runs f with a writer and its stream, for each codec.
func eachCodec(t *testing.T, f func(t *testing.T, w *stream.Writer, s *stream.Stream)) {
	for _, codec := range []stream.Codec{stream.JSON, stream.MsgPack} {
		t.Run(codec.String(), func(t *testing.T) {
			w, s := newWriterStream(t, newPair(t, pairOptions{consumer: stream.ClientParams{Codec: codec}}))
			f(t, w, s)
		})
	}
}

// One variable takes all records of a stream, whatever their fields hold, and copies of it stay as they are.
func TestObjectsOfOneVariableStayApart(t *testing.T) {
	type event struct {
		Kind  string `json:"kind"`
		Data  any
		Bytes []byte
		Token string `json:"-"`
	}
	events := []event{
		{"a", "text", []byte("first"), "secret"}, {"b", []any{1.5, "x"}, []byte("2nd"), "secret"},
		{"c", map[string]any{"k": true}, nil, "secret"}, {"d", nil, []byte{}, "secret"}, {"e", false, []byte("the last of them"), "secret"},
	}
	eachCodec(t, func(t *testing.T, w *stream.Writer, s *stream.Stream) {
		for i := range events {
			if _, err := w.WriteObject(events[i]); err != nil {
				t.Fatal(err)
			}
		}
		closeWriter(t, w)
		var ev event
		var got []event
		for {
			err := s.RecvObject(&ev)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, ev)
		}
		for i, want := range events {
			if want.Token = ""; i >= len(got) || !reflect.DeepEqual(got[i], want) {
				t.Fatalf("%+v; record %d should be %+v", got, i, want)
			}
		}
	})
}

// The codec in use is that of the record. Bytes in another one are an error, not another value.
func TestObjectOfAnotherCodecIsAnError(t *testing.T) {
	w, s := newWriterStream(t, newPair(t, pairOptions{consumer: stream.ClientParams{Codec: stream.MsgPack}}))
	for _, text := range []string{`{"a":1}`, `[1,2]`, `"text"`, `12`, `true`} {
		write(t, w, []byte(text))
	}
	closeWriter(t, w)
	for range 5 {
		var v any
		if err := s.RecvObject(&v); err == nil || err == io.EOF {
			t.Errorf("%v, %v", v, err)
		}
	}
	wantEOF(t, s)
}

// fails has methods that fail, at both ends.
type fails struct{ err error }

func (f fails) MarshalJSON() ([]byte, error)              { return nil, f.err }
func (f fails) EncodeMsgpack(*msgpack.Encoder) error      { return f.err }
func (f *fails) UnmarshalJSON([]byte) error               { return f.err }
func (f *fails) DecodeMsgpack(dec *msgpack.Decoder) error { _ = dec.Skip(); return f.err }

// A method of an object that fails does not look like the end of the stream, whatever error it returns. Its error is
// found all the same.
func TestErrorsOfObjectsAreNoEnds(t *testing.T) {
	ends := []error{
		io.EOF, stream.ErrClosed, stream.ErrClientClosed, stream.ErrServerClosed, stream.ErrConcurrentRecv, stream.ErrOneWay,
		context.Canceled, context.DeadlineExceeded, nats.ErrNoResponders, nats.ErrConnectionClosed, nats.ErrConnectionDraining,
	}
	own := &fs.PathError{Op: "own", Err: errors.New("error")}
	eachCodec(t, func(t *testing.T, w *stream.Writer, s *stream.Stream) {
		errs := append([]error{&stream.CloseError{Code: stream.CloseNormalClosure}, &stream.CloseError{Code: 4000, Text: "x"}}, ends...)
		check := func(err error) {
			t.Helper()
			if err == nil {
				t.Error("no error")
			}
			for _, end := range ends {
				if errors.Is(err, end) {
					t.Errorf("%v is %v", err, end)
				}
			}
			if ce, ok := errors.AsType[*stream.CloseError](err); ok {
				t.Errorf("%v is %v", err, ce)
			}
			if errors.Is(err, &stream.CloseError{Code: stream.CloseNormalClosure}) {
				t.Errorf("%v is a close", err)
			}
		}
		for _, err := range errs {
			for _, err := range []error{err, fmt.Errorf("wrapped: %w", err), errors.Join(own, err)} {
				for _, v := range []any{fails{err}, []any{"begun", fails{err}}, map[string]fails{"a": {err}}} {
					_, got := w.WriteObject(v)
					check(got)
					if errors.Is(err, own) != errors.Is(got, own) {
						t.Errorf("%v hides %v", got, own)
					}
				}
				if _, err := w.WriteObject([]any{"a", 1}); err != nil {
					t.Fatal(err)
				}
				if err := w.Flush(); err != nil {
					t.Fatal(err)
				}
				into := []*fails{{err}, {err}}
				got := s.RecvObject(&into)
				check(got)
				if errors.Is(err, own) != errors.Is(got, own) {
					t.Errorf("%v hides %v", got, own)
				}
			}
		}
		if _, err := w.WriteObject(fails{own}); !errors.Is(err, own) {
			t.Error(err)
		} else if got, ok := errors.AsType[*fs.PathError](err); !ok || got != own {
			t.Errorf("%v has no %v", err, own)
		}
		closeWriter(t, w)
		wantEOF(t, s)
	})
}

// An object that no reader could decode is an error at its writer, which goes on.
func TestWriteObjectRefusesWhatCannotBeRead(t *testing.T) {
	type list struct{ Next *list }
	cycle := new(list)
	cycle.Next = cycle
	loose := []any{nil}
	loose[0] = map[string]any{"x": loose}
	eachCodec(t, func(t *testing.T, w *stream.Writer, s *stream.Stream) {
		deep := func(n int) (l *list) {
			for range n {
				l = &list{l}
			}
			return l
		}
		for _, v := range []any{cycle, loose, deep(20_000), make(chan int), []any{func() {}}} {
			if n, err := w.WriteObject(v); n != 0 || err == nil || !strings.HasPrefix(err.Error(), "stream: encode ") {
				t.Errorf("WriteObject of %T: %d, %v", v, n, err)
			}
		}
		if _, err := w.WriteObject(deep(1100)); err != nil {
			t.Error(err)
		}
		closeWriter(t, w)
		var got *list
		if err := s.RecvObject(&got); err != nil {
			t.Error(err)
		}
		n := 0
		for ; got != nil; got = got.Next {
			n++
		}
		if n != 1100 {
			t.Errorf("%d of 1100", n)
		}
		wantEOF(t, s)
	})
}

// custom is an object whose encoding a test controls.
type custom struct{ encode func() ([]byte, error) }

func (c custom) MarshalJSON() ([]byte, error) { return c.encode() }

func (c custom) MarshalMsgpack() ([]byte, error) { return c.encode() }

func TestEncoderThatFailsSendsNothing(t *testing.T) {
	failure := errors.New("cannot encode")
	for _, codec := range []stream.Codec{stream.JSON, stream.MsgPack} {
		t.Run(codec.String(), func(t *testing.T) {
			p := newPair(t, pairOptions{consumer: stream.ClientParams{Codec: codec}})
			w, s := newWriterStream(t, p)
			bad := custom{func() ([]byte, error) { return nil, failure }}
			panics := custom{func() ([]byte, error) { panic(failure) }}
			exits := custom{func() ([]byte, error) { runtime.Goexit(); return nil, nil }}
			var want []string
			for i := range 20 {
				if n, err := w.WriteObject(bad); n != 0 || !errors.Is(err, failure) {
					t.Errorf("WriteObject: %d, %v", n, err)
				}
				if _, err := w.WriteObject([]any{strings.Repeat("begun", 10<<i%2000), bad}); !errors.Is(err, failure) {
					t.Errorf("WriteObject: %v", err)
				}
				if codec == stream.JSON { // MessagePack encodes a channel's address of nothing, as an error of its own
					if _, err := w.WriteObject(make(chan int)); err == nil {
						t.Error("a channel was encoded")
					}
				}
				func() {
					defer func() {
						if v := recover(); v != failure {
							t.Errorf("recovered %v", v)
						}
					}()
					_, err := w.WriteObject([]any{"begun", panics})
					t.Errorf("WriteObject of an object that panics returned %v", err)
				}()
				waitFor(t, "an encoder that exits", func() { w.WriteObject([]any{"begun", exits}) })
				write(t, w, encoded(codec, fmt.Sprint("raw", i)))
				if _, err := w.WriteObject(fmt.Sprint("object", i)); err != nil {
					t.Errorf("WriteObject afterwards: %v", err)
				}
				want = append(want, fmt.Sprint("raw", i), fmt.Sprint("object", i))
				if i%5 == 0 {
					if err := w.Flush(); err != nil {
						t.Errorf("Flush: %v", err)
					}
				}
			}
			closeWriter(t, w)
			for _, want := range want {
				var got string
				if err := s.RecvObject(&got); err != nil || got != want {
					t.Fatalf("%q, %v; want %q", got, err, want)
				}
			}
			wantEOF(t, s)
		})
	}
}

// An encoder that takes its time holds up its own writer alone, and not even that one for ever: its end is noticed.
func TestEncoderThatBlocksHoldsUpItsWriterAlone(t *testing.T) {
	for _, codec := range []stream.Codec{stream.JSON, stream.MsgPack} {
		t.Run(codec.String(), func(t *testing.T) {
			p := newPair(t, pairOptions{consumer: stream.ClientParams{Codec: codec}})
			entered, leave := make(chan struct{}), make(chan struct{})
			slow := custom{func() ([]byte, error) {
				close(entered)
				<-leave
				return encoded(codec, "slow"), nil
			}}
			w, s := newWriterStream(t, p)
			write(t, w, encoded(codec, "before"))
			var got string
			if err := s.RecvObject(&got); err != nil || got != "before" {
				t.Fatalf("%q, %v", got, err)
			}
			p.handlers.Go(func() {
				if _, err := w.WriteObject(slow); err != nil {
					t.Errorf("WriteObject: %v", err)
				}
			})
			waitFor(t, "the encoder", func() { <-entered })
			p.handlers.Go(func() {
				write(t, w, encoded(codec, "behind"))
				closeWriter(t, w)
			})
			other, otherStream := newWriterStream(t, p)
			for i := range 1000 {
				write(t, other, testRecord(i, 100))
				if rec, err := otherStream.Recv(); err != nil || !bytes.Equal(rec, testRecord(i, 100)) {
					t.Fatalf("%q, %v", rec, err)
				}
			}
			closeWriter(t, other)
			wantEOF(t, otherStream)
			close(leave)
			for _, want := range []string{"slow", "behind"} {
				if err := s.RecvObject(&got); err != nil || got != want {
					t.Fatalf("%q, %v; want %q", got, err, want)
				}
			}
			wantEOF(t, s)
		})
		t.Run(codec.String()+"/and the consumer leaves", func(t *testing.T) {
			p := newPair(t, pairOptions{consumer: stream.ClientParams{Codec: codec}})
			entered, leave := make(chan struct{}), make(chan struct{})
			w, s := newWriterStream(t, p)
			write(t, w, []byte("before"))
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
			p.handlers.Go(func() {
				_, err := w.WriteObject(custom{func() ([]byte, error) {
					close(entered)
					<-leave
					return encoded(codec, strings.Repeat("slow", 1000)), nil
				}})
				if !errors.Is(err, &stream.CloseError{Code: stream.CloseCanceled}) {
					t.Errorf("WriteObject: %v", err)
				}
			})
			waitFor(t, "the encoder", func() { <-entered })
			s.Close()
			endedBy(t, w, &stream.CloseError{Code: stream.CloseCanceled})
			close(leave)
		})
	}
}

// An encoder that blocks does not hold back earlier records.
func TestEncoderThatBlocksHoldsBackNoEarlierRecord(t *testing.T) {
	p := newPair(t)
	for range scaled(200) {
		w, s := newWriterStream(t, p)
		arrived := make(chan struct{})
		p.handlers.Go(func() {
			write(t, w, []byte("before"))
			if _, err := w.WriteObject(custom{func() ([]byte, error) {
				select {
				case <-arrived:
				case <-w.Context().Done():
				}
				return encoded(stream.MsgPack, "slow"), nil
			}}); err != nil {
				t.Errorf("WriteObject: %v", err)
			}
			if err := w.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
		waitFor(t, "the record before a blocking encoder", func() {
			if rec, err := s.Recv(); err != nil || string(rec) != "before" {
				t.Errorf("%q, %v", rec, err)
			}
		})
		close(arrived)
		if got, err := readAll(s); err != io.EOF || len(got) != 1 {
			t.Fatalf("%q, %v", got, err)
		}
	}
}

type keyed struct {
	Writer, N int
	Pad       string
}

// WriteObject, Write, Flush and Close at the same time: the records that were taken arrive, in order, and no others.
func TestConcurrentObjectsAndRecordsKeepTheirOrder(t *testing.T) {
	for _, codec := range []stream.Codec{stream.JSON, stream.MsgPack} {
		t.Run(codec.String(), func(t *testing.T) {
			p := newPair(t, pairOptions{consumer: stream.ClientParams{Codec: codec}})
			for round := range scaled(50) {
				const writers = 6
				w, s := newWriterStream(t, p)
				var taken [writers]atomic.Int64
				for k := range writers {
					p.handlers.Go(func() {
						for i := 0; ; i++ {
							v := keyed{k, i, strings.Repeat("x", i*i%5000)}
							var err error
							switch k % 3 {
							case 0:
								_, err = w.WriteObject(v)
							case 1:
								var b []byte
								if codec == stream.JSON {
									b, _ = json.Marshal(v)
								} else {
									b, _ = msgpack.Marshal(v)
								}
								_, err = w.Write(b)
							case 2:
								if _, err = w.WriteObject(&v); err == nil {
									err = w.Flush()
									if err == nil || errors.Is(err, stream.ErrClosed) {
										taken[k].Add(1)
										continue
									}
								}
							}
							if err != nil {
								if !errors.Is(err, stream.ErrClosed) {
									t.Errorf("goroutine %d: %v", k, err)
								}
								return
							}
							taken[k].Add(1)
						}
					})
				}
				p.handlers.Go(func() {
					for range round * 100 {
						runtime.Gosched()
					}
					closeWriter(t, w)
				})
				var next [writers]int
				for {
					var v keyed
					err := s.RecvObject(&v)
					if err == io.EOF {
						break
					}
					if err != nil {
						t.Fatal(err)
					}
					if v.N != next[v.Writer] || len(v.Pad) != v.N*v.N%5000 {
						t.Fatalf("object %d of goroutine %d, %d bytes; want object %d", v.N, v.Writer, len(v.Pad), next[v.Writer])
					}
					next[v.Writer]++
				}
				waitFor(t, "the writers", p.handlers.Wait)
				for k := range writers {
					if n := int(taken[k].Load()); n != next[k] {
						t.Fatalf("%d objects of goroutine %d were taken, %d arrived", n, k, next[k])
					}
				}
			}
		})
	}
}

// WriteAppend sends exactly what encode appended, whether it fits into the packet or not, and beside other writers.
func TestWriteAppendSendsWhatWasAppended(t *testing.T) {
	p := newPair(t)
	sizes := []int{0, 1, 100, 4000, 16 << 10, 32<<10 - 30, 32 << 10, 100_000, 256 << 10, 1 << 20}
	broken := errors.New("broken encoder")
	s := newService(t, p, stream.ServerParams{})
	s.handle(t, "svc", func(w *stream.Writer, _ *stream.Request) error {
		var others sync.WaitGroup
		others.Go(func() {
			for range 100 {
				_, _ = w.Write([]byte("other"))
			}
		})
		defer others.Wait()
		for i, size := range sizes {
			want := bytes.Repeat([]byte{byte('a' + i)}, size)
			n, err := w.WriteAppend(func(dst []byte) ([]byte, error) { return append(dst, want...), nil })
			if err != nil || n != size {
				return fmt.Errorf("%d bytes: %d, %v", size, n, err)
			}
			if n, err := w.WriteAppend(func(dst []byte) ([]byte, error) { return append(dst, "lost"...), broken }); n != 0 || err != broken {
				return fmt.Errorf("an error of the encoder: %d, %v", n, err)
			}
		}
		if _, err := w.WriteAppend(func(dst []byte) ([]byte, error) { return append(dst, make([]byte, 17<<20)...), nil }); !errors.Is(err, stream.ErrRecordTooLarge) {
			return fmt.Errorf("too large: %v", err)
		}
		return nil
	})
	in := open(t, p.consumer, "svc")
	i := 0
	for {
		rec, codec, err := in.RecvRecord()
		if err == io.EOF {
			break
		}
		if err != nil || codec != stream.CodecDefault {
			t.Fatalf("%v, %v", codec, err)
		}
		if string(rec) == "other" {
			continue
		}
		if want := bytes.Repeat([]byte{byte('a' + i)}, sizes[i]); !bytes.Equal(rec, want) {
			t.Fatalf("record %d has %d bytes, want %d", i, len(rec), len(want))
		}
		i++
	}
	if i != len(sizes) {
		t.Errorf("%d records, want %d", i, len(sizes))
	}
}

// A consumer's WriteAppend reaches the handler, and RecvRecord tells which codec a record has.
func TestRecvRecordTellsTheCodec(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
		rec, codec, err := r.RecvRecord()
		if err != nil || string(rec) != "up" || codec != stream.CodecDefault {
			return fmt.Errorf("%q, %v, %w", rec, codec, err)
		}
		if _, err := w.WriteObject(1); err != nil {
			return err
		}
		_, err = w.Write([]byte("bytes"))
		return err
	})
	for _, codec := range []stream.Codec{stream.JSON, stream.MsgPack} {
		c := p.newClient(t, stream.ClientParams{Codec: codec})
		in := open(t, c, "svc")
		if _, err := in.WriteAppend(func(dst []byte) ([]byte, error) { return append(dst, "up"...), nil }); err != nil {
			t.Fatal(err)
		}
		if rec, got, err := in.RecvRecord(); err != nil || got != codec || len(rec) != 1 {
			t.Errorf("%q, %v, %v; want %v", rec, got, err, codec)
		}
		if rec, got, err := in.RecvRecord(); err != nil || got != stream.CodecDefault || string(rec) != "bytes" {
			t.Errorf("%q, %v, %v", rec, got, err)
		}
		if _, err := in.Recv(); err != io.EOF {
			t.Errorf("%v, want io.EOF", err)
		}
		if err := in.Close(); err != nil {
			t.Error(err)
		}
	}
}
