package stream

import (
	"context"
	"sync"
)

// lazyContext is a context that is made when a user asks for it: most users of a stream never do. Any goroutine may
// call its methods, which take mu for moments. The zero lazyContext is ready for use.
type lazyContext struct {
	mu    sync.Mutex // guards the fields below
	made  *madeContext
	cause error // of the end; nil before it
}

type madeContext struct {
	context.Context
	cancel context.CancelCauseFunc
}

// get returns the context, a child of parent, which is the same at each call.
func (l *lazyContext) get(parent context.Context) context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.made == nil {
		if l.cause != nil {
			parent = context.WithoutCancel(parent) // the context ended before its parent may have ended
		}
		l.made = new(madeContext)
		l.made.Context, l.made.cancel = context.WithCancelCause(parent)
		if l.cause != nil {
			l.made.cancel(l.cause)
		}
	}
	return l.made.Context
}

// end ends the context, unless it has ended. A cause of nil is [context.Canceled]. When end returns, the context has
// ended, also if another goroutine was first.
func (l *lazyContext) end(cause error) (first bool) {
	if cause == nil {
		cause = context.Canceled
	}
	l.mu.Lock()
	if first = l.cause == nil; first {
		l.cause = cause
	}
	cause, made := l.cause, l.made
	l.mu.Unlock()
	if made != nil {
		made.cancel(cause)
	}
	return first
}

// endCause returns the cause of the end, nil before it.
func (l *lazyContext) endCause() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cause
}

// ended reports whether the context has ended by end.
func (l *lazyContext) ended() bool { return l.endCause() != nil }
