package streamtest

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"sync"

	"github.com/nats-io/nats-server/v2/server"
)

// WithConfig reads text as a NATS configuration file, so that a test can use a documented configuration word for word.
// It changes the options that text names, and adds accounts and users to the present ones. If text is no configuration,
// [Start] and [StartProcess] return an error. Outside of them, WithConfig panics instead.
//
//	srv := streamtest.Run(t, streamtest.WithConfig(`
//		authorization { users: [ { user: reader, password: x, permissions: { subscribe: "log.>" } } ] }
//	`))
func WithConfig(text string) Option {
	return func(o *server.Options) {
		if r, ok := recorders.Load(o); ok {
			r.(*recorder).config(o, text)
		} else if err := o.ProcessConfigString(text); err != nil {
			panic(fmt.Errorf("streamtest: %w", err))
		}
	}
}

// recorders holds a *recorder for each *server.Options to which options are being applied. An Option has no other
// argument, and it cannot return an error.
var recorders sync.Map

// A recorder takes values of WithConfig for which server.Options has no field: its error, and the text itself if the
// server will run in another process. A parsed configuration could not be sent to that process.
type recorder struct {
	remote bool
	texts  []string
	err    error
}

func (r *recorder) config(o *server.Options, text string) {
	if r.remote {
		r.texts = append(r.texts, text)
	} else if err := o.ProcessConfigString(text); err != nil && r.err == nil {
		r.err = err
	}
}

// defaults are the options before any Option is applied, here and in a Process.
func defaults() *server.Options {
	return &server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true}
}

// apply applies opts to o.
func apply(o *server.Options, opts []Option) error {
	r := &recorder{}
	recorders.Store(o, r)
	defer recorders.Delete(o)
	for _, opt := range opts {
		opt(o)
	}
	return r.err
}

// A step is an Option on its way to another process: configuration text, or the fields of server.Options that it
// changed, by names such as Cluster.PoolSize.
type step struct {
	Config string                     `json:",omitempty"`
	Fields map[string]json.RawMessage `json:",omitempty"`
}

// record applies opts to o and returns the steps by which another process gets the same options. It fails if an option
// sets an interface or a function, because these cannot be sent to that process.
func record(o *server.Options, opts []Option) ([]step, error) {
	r := &recorder{remote: true}
	recorders.Store(o, r)
	defer recorders.Delete(o)
	var steps []step
	for _, opt := range opts {
		before := *o
		r.texts = nil
		opt(o)
		for _, text := range r.texts {
			steps = append(steps, step{Config: text})
		}
		fields := map[string]json.RawMessage{}
		if err := diff(fields, "", reflect.ValueOf(before), reflect.ValueOf(*o)); err != nil {
			return nil, err
		}
		if len(fields) > 0 {
			steps = append(steps, step{Fields: fields})
		}
	}
	return steps, nil
}

// diff adds to fields those in which the struct after differs from before.
func diff(fields map[string]json.RawMessage, prefix string, before, after reflect.Value) error {
	for f := range after.Type().Fields() {
		if !f.IsExported() {
			continue
		}
		name, was, is := prefix+f.Name, before.FieldByIndex(f.Index), after.FieldByIndex(f.Index)
		if f.Type.Kind() == reflect.Struct {
			if err := diff(fields, name+".", was, is); err != nil {
				return err
			}
			continue
		}
		if reflect.DeepEqual(was.Interface(), is.Interface()) {
			continue
		}
		b, err := json.Marshal(is.Interface())
		back := reflect.New(f.Type)
		if err == nil {
			err = json.Unmarshal(b, back.Interface())
		}
		// JSON omits values that it cannot express. A server with other options than the test asked for would be worse
		// than none.
		if err != nil || !reflect.DeepEqual(back.Elem().Interface(), is.Interface()) {
			return fmt.Errorf("streamtest: option %s cannot be sent to another process, use WithConfig", name)
		}
		fields[name] = b
	}
	return nil
}

// do takes the step in the other process.
func (s step) do(o *server.Options) error {
	if s.Config != "" {
		return o.ProcessConfigString(s.Config)
	}
	for name, b := range s.Fields {
		f := reflect.ValueOf(o).Elem()
		for part := range strings.SplitSeq(name, ".") {
			f = f.FieldByName(part)
		}
		f.SetZero() // otherwise maps and slices would keep their old elements
		if err := json.Unmarshal(b, f.Addr().Interface()); err != nil {
			return fmt.Errorf("option %s: %w", name, err)
		}
	}
	return nil
}
