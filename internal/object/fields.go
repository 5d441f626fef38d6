package object

import (
	"cmp"
	"encoding/json"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// This file finds the fields of a struct and their names from tags, once for each type. The goroutine that makes the
// plan of the type runs it, with plans.mu locked. It touches no state.

// field is one entry of a struct's record.
type field struct {
	name      string
	aliases   []string // names that the decoder takes as well
	tagged    bool
	index     []int
	typ       reflect.Type
	omitEmpty bool
	omitZero  bool
}

// structFields returns the fields of t, in the order of their declaration, and whether t is an array instead of a map.
// Names, embedding and hiding are those of encoding/json, so both codecs agree. A msgpack tag, if there is one, stands
// in for the json tag.
func structFields(t reflect.Type) (fields []field, asArray bool) {
	if f, ok := t.FieldByName("_msgpack"); ok && len(f.Index) == 1 {
		_, options := parseTag(f.Tag.Get("msgpack"))
		asArray = slices.Contains(options, "as_array") || slices.Contains(options, "asArray")
	}
	visited := map[reflect.Type]bool{}
	var count map[reflect.Type]int
	for next := []field{{typ: t}}; len(next) > 0; {
		current, counted := next, count
		next, count = nil, map[reflect.Type]int{}
		for _, outer := range current {
			if visited[outer.typ] {
				continue
			}
			visited[outer.typ] = true
			for i := range outer.typ.NumField() {
				f, embedded, ok := structField(outer.typ.Field(i), append(slices.Clip(outer.index), i))
				switch {
				case !ok:
				case embedded:
					if count[f.typ]++; count[f.typ] == 1 {
						next = append(next, f)
					}
				default:
					fields = append(fields, f)
					if counted[outer.typ] > 1 { // embedded twice at one depth: its fields hide each other
						fields = append(fields, f)
					}
				}
			}
		}
	}
	return visible(fields), asArray
}

// structField reads the tags of f. An embedded struct without a name of its own lends its fields to the outer one.
func structField(f reflect.StructField, index []int) (_ field, embedded, ok bool) {
	base := f.Type
	if base.Name() == "" && base.Kind() == reflect.Pointer {
		base = base.Elem()
	}
	if !takesPart(f) {
		return field{}, false, false
	}
	tag := f.Tag.Get("msgpack")
	if tag == "" {
		tag = f.Tag.Get("json")
	}
	if tag == "-" {
		return field{}, false, false
	}
	name, options := parseTag(tag)
	if f.Anonymous && name == "" && base.Kind() == reflect.Struct && !slices.Contains(options, "noinline") {
		return field{index: index, typ: base}, true, true
	}
	out := field{name: name, tagged: name != "", index: index, typ: f.Type}
	if name == "" {
		out.name = f.Name
	}
	for _, option := range options {
		alias, isAlias := strings.CutPrefix(option, "alias:")
		switch {
		case option == "omitempty":
			out.omitEmpty = true
		case option == "omitzero":
			out.omitZero = true
		case isAlias:
			out.aliases = append(out.aliases, alias)
		}
	}
	return out, false, true
}

// takesPart reports whether the codecs use f: it is exported, or it is embedded and may have exported fields.
func takesPart(f reflect.StructField) bool {
	t := f.Type
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return f.IsExported() || f.Anonymous && t.Kind() == reflect.Struct
}

// parseTag returns the name and the options of a tag. encoding/json decides about a name with quotes or other unusual
// characters in it.
func parseTag(tag string) (name string, options []string) {
	name, rest, _ := strings.Cut(tag, ",")
	for _, c := range name {
		if !strings.ContainsRune("!#$%&()*+-./:;<=>?@[]^_{|}~ ", c) && !unicode.IsLetter(c) && !unicode.IsDigit(c) {
			name = unusualName(tag)
			break
		}
	}
	return name, strings.Split(rest, ",")
}

// unusualName returns the name that encoding/json takes from a tag, "" if it takes none. Versions of Go differ.
func unusualName(tag string) string {
	const none = "None"
	t := reflect.StructOf([]reflect.StructField{{Name: none, Type: reflect.TypeFor[*int](), Tag: reflect.StructTag("json:" + strconv.Quote(tag))}})
	var names map[string]any
	if b, err := json.Marshal(reflect.Zero(t).Interface()); err != nil || json.Unmarshal(b, &names) != nil {
		return ""
	}
	for name := range names {
		if name != none {
			return name
		}
	}
	return ""
}

// visible keeps one field of each name: the least deep one, and among several of these the one with a tag. If more than
// one is left, it keeps none.
func visible(fields []field) []field {
	slices.SortFunc(fields, func(a, b field) int {
		return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(len(a.index), len(b.index)), -compareBool(a.tagged, b.tagged),
			slices.Compare(a.index, b.index))
	})
	out := fields[:0]
	for i := 0; i < len(fields); {
		n := 1
		for i+n < len(fields) && fields[i+n].name == fields[i].name {
			n++
		}
		if n == 1 || len(fields[i].index) != len(fields[i+1].index) || fields[i].tagged != fields[i+1].tagged {
			out = append(out, fields[i])
		}
		i += n
	}
	slices.SortFunc(out, func(a, b field) int { return slices.Compare(a.index, b.index) })
	return out
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}
