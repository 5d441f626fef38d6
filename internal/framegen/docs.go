package main

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"maps"
	"strings"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file writes the generated parts of documents. The goroutine of main runs it, for make generate and make
// checkgenerate.

const (
	beginMark = "<!-- generated:begin "
	endMark   = "<!-- generated:end "
	markClose = " -->\n"
)

// tables are the generated parts of docs/PROTOCOL.md, by the name in their markers.
func tables() map[string]string {
	return map[string]string{
		"packet-header": layoutTable(packetHeader),
		"packet-flags":  packetFlagTable(),
		"frame-header":  layoutTable(frameHeader),
		"frame-types":   frameTypeTable(),
		"frame-flags":   frameFlagTable(),
		"credit":        layoutTable(credit),
		"fragment":      layoutTable(fragment),
		"close-codes":   closeCodeTable(),
		"token":         tokenTable(),
		"errors":        errorTable(),
		"example":       example(),
		"states":        stateTable(),
		"transitions":   transitionTable(),
	}
}

// documents are the files with generated parts. Their prose is written by hand.
var documents = []struct {
	path  string
	parts func() map[string]string
}{
	{"docs/PROTOCOL.md", tables},
	{"docs/DESIGN.md", lifecycleDiagrams},
}

// fillTables replaces the text between the markers of doc by the parts with the names in the markers. Each part must be
// used exactly once.
func fillTables(doc []byte, parts map[string]string) ([]byte, error) {
	open := maps.Clone(parts)
	var out bytes.Buffer
	rest := string(doc)
	for {
		before, after, found := strings.Cut(rest, beginMark)
		out.WriteString(before)
		if !found {
			break
		}
		name, after, found := strings.Cut(after, markClose)
		if !found {
			return nil, fmt.Errorf("unfinished marker at %.40q", after)
		}
		part, found := open[name]
		if !found {
			return nil, fmt.Errorf("part %q is unknown or stands there twice", name)
		}
		delete(open, name)
		end := endMark + name + markClose
		if _, rest, found = strings.Cut(after, end); !found {
			return nil, fmt.Errorf("part %q has no end marker", name)
		}
		out.WriteString(beginMark + name + markClose + "\n" + part + "\n" + end)
	}
	for name := range open {
		return nil, fmt.Errorf("part %q has no markers", name)
	}
	return out.Bytes(), nil
}

// markdown returns a table with columns padded to equal width, so that it reads well as text too.
func markdown(rows [][]string) string {
	width := make([]int, len(rows[0]))
	for _, r := range rows {
		for i, c := range r {
			width[i] = max(width[i], len([]rune(c)))
		}
	}
	var out strings.Builder
	for n, r := range rows {
		for i, c := range r {
			fmt.Fprintf(&out, "| %-*s ", width[i], c)
		}
		out.WriteString("|\n")
		if n == 0 {
			for _, w := range width {
				out.WriteString("|" + strings.Repeat("-", w+2))
			}
			out.WriteString("|\n")
		}
	}
	return out.String()
}

func layoutTable(l layout) string {
	rows := [][]string{{"offset", "size", "field", "value"}}
	pos := 0
	for _, f := range l.fields {
		size := plural(f.bits/8, "byte")
		if f.bits%8 != 0 {
			size = "low " + plural(f.bits, "bit")
			if pos%8 == 0 {
				size = "high " + plural(f.bits, "bit")
			}
		}
		doc := f.doc
		if f.fixed {
			doc = fmt.Sprintf("%s: %s", number(f), f.doc)
		}
		rows = append(rows, []string{fmt.Sprint(pos / 8), size, f.name, doc})
		pos += f.bits
	}
	return markdown(rows)
}

func plural(n int, unit string) string {
	if n == 1 {
		return "1 " + unit
	}
	return fmt.Sprintf("%d %ss", n, unit)
}

func packetFlagTable() string {
	rows := [][]string{{"value", "flag", "meaning"}}
	for _, f := range packetFlags {
		rows = append(rows, []string{fmt.Sprintf("0x%X", f.value), f.name, f.doc})
	}
	return markdown(rows)
}

func frameTypeTable() string {
	rows := [][]string{{"type", "name", "in packets", "flags", "code", "payload"}}
	for _, t := range frameTypes {
		in, code, flags := "without SEQ", "0", "none"
		if t.seq {
			in = "with SEQ"
		}
		if t.code == codeClose {
			code = fmt.Sprintf("%d–%d", minCloseCode, maxCloseCode)
		}
		var names []string
		for _, f := range t.flags {
			if f.value&flagCodecMask.value == 0 && f.value != 0 {
				names = append(names, f.name)
			} else if f.value == flagCodecMask.value&-flagCodecMask.value {
				names = append(names, "codec")
			}
		}
		if len(names) > 0 {
			flags = strings.Join(names, ", ")
		}
		rows = append(rows, []string{fmt.Sprint(t.value), t.name, in, flags, code, t.doc})
	}
	rows = append(rows,
		[]string{fmt.Sprintf("0, %d–%d", len(frameTypes)+1, skippable-1), "", "none", "", "", "unknown: an error"},
		[]string{fmt.Sprint(typeEnvelopes.value), typeEnvelopes.name, "without SEQ", "none", "0", typeEnvelopes.doc},
		[]string{fmt.Sprint(typePadding.value), typePadding.name, "with SEQ", "none", "0", typePadding.doc},
		[]string{fmt.Sprintf("%d–255", typePadding.value+1), "", "both", "any", "any", "unknown: skipped"})
	return markdown(rows)
}

func frameFlagTable() string {
	rows := [][]string{{"frame", "bits", "value", "flag", "meaning"}}
	for _, t := range frameTypes {
		for _, f := range t.flags {
			mask := f.value
			if f.value&^flagCodecMask.value == 0 {
				mask = flagCodecMask.value
			}
			rows = append(rows, []string{t.name, fmt.Sprintf("0x%02X", mask), fmt.Sprintf("0x%02X", f.value), f.name, f.doc})
		}
		if t.value == typeData.value {
			rows = append(rows, []string{t.name, fmt.Sprintf("0x%02X", flagCodecMask.value), fmt.Sprintf("0x%02X", flagCodecMask.value), "", "codec: reserved"})
		}
	}
	return markdown(rows)
}

func closeCodeTable() string {
	rows := [][]string{{"code", "name", "meaning"}}
	for _, c := range closeCodes {
		rows = append(rows, []string{fmt.Sprint(c.value), c.name, c.doc})
	}
	return markdown(rows)
}

func tokenTable() string {
	rows := [][]string{{"offset", "characters", "field", "value"}}
	pos := 0
	for _, p := range token {
		rows = append(rows, []string{fmt.Sprint(pos), fmt.Sprint(p.chars), p.name, p.doc})
		pos += p.chars
	}
	return markdown(rows)
}

func errorTable() string {
	rows := [][]string{{"identifier", "Go", "meaning"}}
	for _, e := range errorKinds {
		rows = append(rows, []string{"`" + e.id + "`", "`" + e.goName + "`", e.doc})
	}
	return markdown(rows)
}

// stateTable names the states of both halves and of the stream.
func stateTable() string {
	rows := [][]string{{"of", "state", "meaning"}}
	for _, of := range []struct {
		name  string
		words []lifecycle.Word
	}{{"sender", lifecycle.Sends}, {"receiver", lifecycle.Recvs}, {"stream", lifecycle.Phases}} {
		for _, w := range of.words {
			rows = append(rows, []string{of.name, w.Name, w.Doc})
		}
	}
	return markdown(rows)
}

// transitionTable is the table of internal/lifecycle in words. An arrow leads to a new state.
func transitionTable() string {
	rows := [][]string{{"role", "event", "sender", "receiver", "stream", "action", "note"}}
	change := func(from, to string) string {
		if to == "" || to == from {
			return from
		}
		return from + " → " + to
	}
	for _, r := range lifecycle.Rows() {
		rows = append(rows, []string{r.Role, r.Event, change(r.Send, r.ToSend), change(r.Recv, r.ToRecv), change(r.Phase, r.ToPhase), r.Do, r.Why})
	}
	return markdown(rows)
}

// example shows one small packet byte by byte.
func example() string {
	line := func(b []byte, note string) string {
		h := strings.TrimSpace(strings.Join(chunk(hex.EncodeToString(b), 2), " "))
		return fmt.Sprintf("%-50s%s\n", h, note)
	}
	var body []byte
	var lines strings.Builder
	frame := func(t frameType, flags flagDef, code uint16, payload, note string) {
		b, _ := frame(uint64(t.value), uint64(flags.value), uint64(code), payload)
		body = append(body, b...)
		lines.WriteString(line(b[:frameHeader.size()], note))
		if payload != "" {
			lines.WriteString(line([]byte(payload), fmt.Sprintf("    %q", payload)))
		}
	}
	frame(typeData, flagRaw, 0, "hello", "frame: DATA, raw, 5 bytes")
	frame(typeData, flagJSON, 0, `{"n":1}`, "frame: DATA, JSON, 7 bytes")
	frame(typeClose, flagRaw, 1000, "", "frame: CLOSE 1000, no reason")
	b := packet(values{"flags": 3, "sender": 0xC0FFEE00BEEE, "seq": 0}, body)
	note := fmt.Sprintf("packet: version 1, flags SEQ and ACK, sender 0xC0FFEE00BEEE, seq 0, %d bytes", len(b))
	return "```text\n" + line(b[:packetHeader.size()], note) + lines.String() + "```\n"
}

func chunk(s string, n int) []string {
	var out []string
	for ; len(s) > n; s = s[n:] {
		out = append(out, s[:n])
	}
	return append(out, s)
}
