package stream

import (
	"context"
	"io"
	"sync/atomic"
)

// lazyContext is a context that is made when a user asks for it: most users of a stream never do. Any goroutine may
// call its methods. They take no lock of this package, and ending a context that was made takes those of package
// context. The zero lazyContext is ready for use. It is one word, because every idle stream has three of them at both ends
// together.
type lazyContext struct {
	state atomic.Pointer[contextState] // nil before the context is made or ends
}

// contextState does not change after lazyContext.state points to it.
type contextState struct {
	made   context.Context // nil before a user asks for it
	cancel context.CancelCauseFunc
	cause  error // of the end; nil before it
}

// The usual ends of contexts that no user has asked for. They cost no allocation.
var (
	endedNormally = contextState{cause: io.EOF}
	endedByClose  = contextState{cause: ErrClosed}
	endedCanceled = contextState{cause: context.Canceled}
)

// get returns the context, a child of parent, which is the same at each call.
func (l *lazyContext) get(parent context.Context) context.Context {
	for {
		state := l.state.Load()
		if state != nil && state.made != nil {
			state.settle()
			return state.made
		}
		next := new(contextState)
		if state != nil {
			next.cause = state.cause
			parent = context.WithoutCancel(parent) // the context ended before its parent may have ended
		}
		next.made, next.cancel = context.WithCancelCause(parent)
		if next.cause != nil {
			next.cancel(next.cause)
		}
		if l.state.CompareAndSwap(state, next) {
			return next.made
		}
		next.cancel(nil) // another goroutine has made or ended the context
	}
}

// end ends the context, unless it has ended. A cause of nil is [context.Canceled]. When end returns, the context has
// ended, also if another goroutine was first.
func (l *lazyContext) end(cause error) (first bool) {
	if cause == nil {
		cause = context.Canceled
	}
	for !first {
		state := l.state.Load()
		if state != nil && state.cause != nil {
			break
		}
		first = l.state.CompareAndSwap(state, state.endedBy(cause))
	}
	l.state.Load().settle()
	return first
}

// endedBy returns the state after the end of a context in state c, which may be nil.
func (c *contextState) endedBy(cause error) *contextState {
	switch {
	case c != nil:
		return &contextState{c.made, c.cancel, cause}
	case cause == endedNormally.cause:
		return &endedNormally
	case cause == endedByClose.cause:
		return &endedByClose
	case cause == endedCanceled.cause:
		return &endedCanceled
	}
	return &contextState{cause: cause}
}

// settle ends the context that was made, if it has ended: the goroutine that stored the state may not have done so yet.
// So a caller that sees the end finds the context ended.
func (c *contextState) settle() {
	if c.made != nil && c.cause != nil {
		c.cancel(c.cause)
	}
}

// endCause returns the cause of the end, nil before it.
func (l *lazyContext) endCause() error {
	state := l.state.Load()
	if state == nil {
		return nil
	}
	state.settle()
	return state.cause
}

// ended reports whether the context has ended by end.
func (l *lazyContext) ended() bool { return l.endCause() != nil }
