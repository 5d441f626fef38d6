package stream

import (
	"context"
	"errors"
	"sync"
	"testing"
)

// A lazyContext ends as one that was there from the beginning: by its own end or by its parent's, and the first counts.
func TestLazyContextEndsAsAnyOther(t *testing.T) {
	own, other := errors.New("own"), errors.New("parent's")
	for _, c := range []struct {
		name  string
		steps string // g: it is asked for; e: it ends; p: its parent ends
		want  error
	}{
		{"not ended", "g", nil},
		{"ended before", "eg", own},
		{"ended after", "ge", own},
		{"ended twice", "gee", own},
		{"parent before", "pg", other},
		{"parent after", "gp", other},
		{"then the parent", "epg", own},
		{"then the parent, asked between", "egp", own},
		{"after the parent", "gpe", other},
	} {
		t.Run(c.name, func(t *testing.T) {
			parent, cancel := context.WithCancelCause(context.Background())
			defer cancel(nil)
			var l lazyContext
			ends := 0
			for _, step := range c.steps {
				switch step {
				case 'g':
					l.get(parent)
				case 'p':
					cancel(other)
				case 'e':
					if first := l.end(own); first != (ends == 0) {
						t.Errorf("end number %d is the first: %v", ends+1, first)
					}
					ends++
				}
			}
			ctx := l.get(parent)
			if cause := context.Cause(ctx); cause != c.want || (ctx.Err() == nil) != (c.want == nil) || l.ended() != (ends > 0) {
				t.Errorf("%v, with the cause %v; ended by itself: %v", ctx.Err(), cause, l.ended())
			}
			l.end(nil)
		})
	}
	var l lazyContext
	if l.end(nil); context.Cause(l.get(context.Background())) != context.Canceled {
		t.Error("an end without a cause is no cancellation")
	}
}

// Goroutines that ask for a context and end it at the same time get one context. It has ended when any end returns, and
// when any of them sees the end.
func TestLazyContextIsSafeForUse(t *testing.T) {
	for range 200 {
		var l lazyContext
		var wg sync.WaitGroup
		got := make([]context.Context, 4)
		for i := range got {
			wg.Go(func() {
				if i%2 == 0 {
					l.end(errors.New("over"))
				}
				got[i] = l.get(t.Context())
				if i%2 == 0 && got[i].Err() == nil {
					t.Error("end returned before the end")
				}
				if l.ended() && got[i].Err() == nil {
					t.Error("the end was seen before the context ended")
				}
			})
		}
		wg.Wait()
		for _, ctx := range got {
			if ctx != got[0] || ctx.Err() == nil {
				t.Error("two contexts, or one that has not ended")
			}
		}
	}
}
