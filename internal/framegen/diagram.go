package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/natsstream/stream/internal/lifecycle"
)

// dimension is one of the three states of a stream: those of its sender, its receiver and the whole stream.
type dimension struct {
	words    []lifecycle.Word
	of       func(lifecycle.State) string // the name of the state in this dimension
	from, to func(lifecycle.Row) string   // the same of a row: "any" for all states, empty for no change
}

var (
	sendDimension = dimension{lifecycle.Sends, func(s lifecycle.State) string { return s.Send.String() },
		func(r lifecycle.Row) string { return r.Send }, func(r lifecycle.Row) string { return r.ToSend }}
	recvDimension = dimension{lifecycle.Recvs, func(s lifecycle.State) string { return s.Recv.String() },
		func(r lifecycle.Row) string { return r.Recv }, func(r lifecycle.Row) string { return r.ToRecv }}
	phaseDimension = dimension{lifecycle.Phases, func(s lifecycle.State) string { return s.Phase.String() },
		func(r lifecycle.Row) string { return r.Phase }, func(r lifecycle.Row) string { return r.ToPhase }}
)

// lifecycleDiagrams are the generated parts of docs/DESIGN.md, by the name in their markers.
func lifecycleDiagrams() map[string]string {
	return map[string]string{
		"sender-diagram":   stateDiagram(sendDimension),
		"receiver-diagram": stateDiagram(recvDimension),
		"stream-diagram":   stateDiagram(phaseDimension),
	}
}

// edge is one arrow of a diagram, with the events that lead along it.
type edge struct {
	from, to string
	events   []string
}

// stateDiagram draws one dimension of the table of internal/lifecycle in Mermaid.
func stateDiagram(d dimension) string {
	var edges []edge
	add := func(from, to, event string) {
		for i := range edges {
			if e := &edges[i]; e.from == from && e.to == to {
				if !slices.Contains(e.events, event) {
					e.events = append(e.events, event)
				}
				return
			}
		}
		edges = append(edges, edge{from, to, []string{event}})
	}
	for _, start := range []struct {
		state lifecycle.State
		label string
	}{
		{lifecycle.Start(lifecycle.Consumer, false), lifecycle.Consumer.String()},
		{lifecycle.Start(lifecycle.Handler, true), lifecycle.Handler.String()},
		{lifecycle.Start(lifecycle.Writer, false), lifecycle.Writer.String()},
		{lifecycle.Start(lifecycle.Handler, false), "handler for a fallback consumer"},
	} {
		add("[*]", d.of(start.state), start.label)
	}
	for _, r := range lifecycle.Rows() {
		to := d.to(r)
		if to == "" {
			continue
		}
		for _, w := range d.words {
			from := d.from(r)
			if w.Name != to && (from == "any" || slices.Contains(strings.Split(from, ", "), w.Name)) {
				add(w.Name, to, r.Event)
			}
		}
	}
	var out strings.Builder
	out.WriteString("```mermaid\nstateDiagram-v2\n")
	for _, e := range edges {
		fmt.Fprintf(&out, "    %s --> %s : %s\n", e.from, e.to, strings.Join(e.events, "<br/>"))
	}
	out.WriteString("```\n")
	return out.String()
}
