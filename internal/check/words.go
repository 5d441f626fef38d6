package main

import (
	"cmp"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
)

// vague finds the words that are counted. Each replaces a noun that the sentence does not name.
var vague = regexp.MustCompile(`(?i)\b(what|whoever|whom|whose|else|wherever)\b`)

const minWords = 3 // fewer are a label and not a sentence

// tally counts sentences.
type tally struct {
	path         string
	found, total int
}

func (t tally) share() float64 { return 100 * float64(t.found) / float64(max(t.total, 1)) }

func (t tally) String() string {
	return fmt.Sprintf("%5.1f %%  %4d of %4d  %s", t.share(), t.found, t.total, t.path)
}

// words prints the share of sentences with a vague word, and the worst files. The error says that the share exceeds
// limit.
func words(out io.Writer, files []source, limit float64, worst int) error {
	all := tally{path: "sentences of comments contain one of what, whoever, whom, whose, else, wherever"}
	var each []tally
	for _, f := range files {
		t := tally{path: f.path}
		for _, group := range f.file.Comments {
			for _, s := range sentences(group.Text()) {
				t.total++
				if vague.MatchString(s) {
					t.found++
				}
			}
		}
		all.found += t.found
		all.total += t.total
		each = append(each, t)
	}
	fmt.Fprintln(out, all)
	slices.SortStableFunc(each, func(a, b tally) int {
		return cmp.Or(cmp.Compare(b.found, a.found), cmp.Compare(b.share(), a.share()))
	})
	for _, t := range each[:min(worst, len(each))] {
		if t.found > 0 {
			fmt.Fprintln(out, t)
		}
	}
	if all.share() > limit {
		return fmt.Errorf("%.1f %% of the sentences hide their subject, and the limit is %.1f %%: name the subject instead", all.share(), limit)
	}
	return nil
}

var (
	sentenceEnd = regexp.MustCompile(`[.!?]["')\]]*(\s+|$)`)
	listMark    = regexp.MustCompile(`^\s*([-*•]|\d+[.)])\s+`)
)

// sentences splits the text of a comment. It omits code blocks. An item of a list begins a new sentence.
func sentences(text string) []string {
	var paragraphs []string
	open := false // the last paragraph goes on
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		switch mark := listMark.FindString(line); {
		case strings.TrimSpace(line) == "":
			open = false
		case mark != "":
			paragraphs = append(paragraphs, line[len(mark):])
			open = true
		case strings.HasPrefix(line, "\t"):
			open = false
		case open:
			paragraphs[len(paragraphs)-1] += " " + strings.TrimSpace(line)
		default:
			paragraphs = append(paragraphs, strings.TrimSpace(line))
			open = true
		}
	}
	var out []string
	for _, p := range paragraphs {
		for _, s := range sentenceEnd.Split(p, -1) {
			if len(strings.Fields(s)) >= minWords {
				out = append(out, s)
			}
		}
	}
	return out
}
