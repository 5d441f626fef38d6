package main

import (
	"cmp"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unicode/utf8"
)

// file is one file to serve; name is its path below the served folder, with slashes.
type file struct {
	name string
	size int64
}

// textFiles returns the largest text files below dir, largest first; all of them if limit is 0. Links, and folders with
// a name that begins with a dot, are left out. The content of a file decides whether it is text.
func textFiles(dir string, limit int) ([]file, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	var all []file
	err = fs.WalkDir(root.FS(), ".", func(name string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil && name == ".":
			return err
		case err != nil:
			return nil // a folder that cannot be read is not served
		case entry.IsDir() && name != "." && strings.HasPrefix(entry.Name(), "."):
			return fs.SkipDir
		case !entry.Type().IsRegular():
			return nil
		}
		if info, err := entry.Info(); err == nil && info.Size() > 0 {
			all = append(all, file{name, info.Size()})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(all, func(a, b file) int {
		return cmp.Or(cmp.Compare(b.size, a.size), cmp.Compare(a.name, b.name))
	})
	var text []file
	for _, f := range all {
		if limit > 0 && len(text) == limit {
			break
		}
		if isText(root, f.name) {
			text = append(text, f)
		}
	}
	if len(text) == 0 {
		return nil, fmt.Errorf("no text files in %s", dir)
	}
	return text, nil
}

// isText reports whether the beginning of a file is UTF-8 without NUL.
func isText(root *os.Root, name string) bool {
	f, err := root.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	head := make([]byte, 4096)
	n, err := io.ReadFull(f, head)
	if err != nil && err != io.ErrUnexpectedEOF {
		return false
	}
	head = head[:n]
	for cut := 0; n == 4096 && cut < utf8.UTFMax-1 && !utf8.Valid(head); cut++ {
		head = head[:len(head)-1] // the last character may be cut in two
	}
	return utf8.Valid(head) && !slices.Contains(head, 0)
}
