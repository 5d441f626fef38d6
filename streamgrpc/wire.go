package streamgrpc

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
)

// This file has the format of the messages of a call; README.md describes it. Its functions touch no state, and any
// goroutine may call them.

// DefaultPrefix begins the subjects of services, unless [WithPrefix] says otherwise.
const DefaultPrefix = "grpc"

// The subject below the prefix that every server answers, whatever its services are. No service can have this name.
const serversToken = "$servers"

// Kinds of records, their first byte.
const (
	recordHeader  = 'H' // of the server: an encoded header
	recordMessage = 'M' // a message
	recordStatus  = 'S' // of the server, its last record, missing if the status is OK and the trailer empty
)

// subject returns the subject of a method, whose name has the form /package.Service/Method.
func subject(prefix, method string) (string, error) {
	service, name, ok := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	if !ok || !validName(service) || !validName(name) || strings.Contains(name, ".") {
		return "", fmt.Errorf("malformed method name %q: it has the form /package.Service/Method", method)
	}
	return prefix + "." + service + "." + name, nil
}

// validName reports whether s can be a part of a subject that a name of a service or method becomes.
func validName(s string) bool {
	if s == "" || strings.HasPrefix(s, ".") || strings.HasSuffix(s, ".") || strings.Contains(s, "..") {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		return r != '.' && r != '_' && r != '-' && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z')
	})
}

// call is the header of a call, which the client sends as the data of its request:
//
//	message Call {
//	  repeated Entry metadata = 1;
//	  int64 timeout = 2;           // nanoseconds until the deadline; 0: none
//	  string codec = 3;            // content subtype; empty: proto
//	  optional bytes message = 4;  // the only message of the client
//	}
//	message Entry { string key = 1; bytes value = 2; }
type call struct {
	md      metadata.MD
	timeout time.Duration
	codec   string
	message []byte
	inline  bool // message is set: no records follow
}

// Numbers of fields.
const (
	fieldMetadata = 1
	fieldTimeout  = 2
	fieldCodec    = 3
	fieldMessage  = 4

	fieldKey   = 1
	fieldValue = 2

	fieldStatus = 2 // of the record of the status
)

var errMalformed = errors.New("streamgrpc: a malformed header: is the peer of another version?")

func (c *call) append(b []byte) []byte {
	b = appendMetadata(b, c.md)
	if c.timeout > 0 {
		b = protowire.AppendTag(b, fieldTimeout, protowire.VarintType)
		b = protowire.AppendVarint(b, uint64(c.timeout))
	}
	if c.codec != "" {
		b = protowire.AppendTag(b, fieldCodec, protowire.BytesType)
		b = protowire.AppendString(b, c.codec)
	}
	if c.inline {
		b = protowire.AppendTag(b, fieldMessage, protowire.BytesType)
		b = protowire.AppendBytes(b, c.message)
	}
	return b
}

func parseCall(b []byte) (c call, err error) {
	c.md = metadata.MD{}
	err = fields(b, func(number protowire.Number, v uint64, data []byte) error {
		switch number {
		case fieldMetadata:
			return addEntry(c.md, data)
		case fieldTimeout:
			c.timeout = time.Duration(min(v, uint64(1<<63-1)))
		case fieldCodec:
			c.codec = string(data)
		case fieldMessage:
			c.message, c.inline = data, true
		}
		return nil
	})
	return c, err
}

// appendMetadata appends md as entries of field 1.
func appendMetadata(b []byte, md metadata.MD) []byte {
	for k, values := range md {
		for _, v := range values {
			n := protowire.SizeTag(fieldKey) + protowire.SizeBytes(len(k)) + protowire.SizeTag(fieldValue) + protowire.SizeBytes(len(v))
			b = protowire.AppendTag(b, fieldMetadata, protowire.BytesType)
			b = protowire.AppendVarint(b, uint64(n))
			b = protowire.AppendTag(b, fieldKey, protowire.BytesType)
			b = protowire.AppendString(b, k)
			b = protowire.AppendTag(b, fieldValue, protowire.BytesType)
			b = protowire.AppendString(b, v)
		}
	}
	return b
}

// addEntry adds an encoded entry to md.
func addEntry(md metadata.MD, b []byte) error {
	var key, value string
	err := fields(b, func(number protowire.Number, _ uint64, data []byte) error {
		switch number {
		case fieldKey:
			key = string(data)
		case fieldValue:
			value = string(data)
		}
		return nil
	})
	if err == nil && !validKey(key) {
		err = errMalformed
	}
	if err != nil {
		return err
	}
	md[key] = append(md[key], value)
	return nil
}

// parseHeader decodes the metadata of a header record.
func parseHeader(b []byte) (metadata.MD, error) {
	md, _, err := parseStatus(b)
	return md, err
}

// parseStatus decodes the record that ends a call: its trailer, and an encoded google.rpc.Status.
func parseStatus(b []byte) (trailer metadata.MD, status []byte, err error) {
	trailer = metadata.MD{}
	err = fields(b, func(number protowire.Number, _ uint64, data []byte) error {
		switch number {
		case fieldMetadata:
			return addEntry(trailer, data)
		case fieldStatus:
			status = data
		}
		return nil
	})
	return trailer, status, err
}

// fields calls f for each field of the encoded message b: with v for a number, and with data for bytes. Fields of other
// types are skipped, as unknown fields are.
func fields(b []byte, f func(number protowire.Number, v uint64, data []byte) error) error {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return errMalformed
		}
		b = b[n:]
		var v uint64
		var data []byte
		switch kind {
		case protowire.VarintType:
			v, n = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			data, n = protowire.ConsumeBytes(b)
		default:
			n = protowire.ConsumeFieldValue(number, kind, b)
		}
		if n < 0 {
			return errMalformed
		}
		b = b[n:]
		if kind == protowire.VarintType || kind == protowire.BytesType {
			if err := f(number, v, data); err != nil {
				return err
			}
		}
	}
	return nil
}

// validKey reports whether k may be a key of metadata: 0-9, a-z, and the characters - _ and dot.
func validKey(k string) bool {
	return k != "" && !strings.ContainsFunc(k, func(r rune) bool {
		return r != '-' && r != '_' && r != '.' && (r < '0' || r > '9') && (r < 'a' || r > 'z')
	})
}

// checkMetadata returns an error for metadata that gRPC does not allow: keys with other characters, keys that gRPC
// reserves, and values that are not printable ASCII, unless their key ends in -bin.
func checkMetadata(md metadata.MD) error {
	for k, values := range md {
		if !validKey(k) {
			return fmt.Errorf("metadata key %q has characters other than 0-9, a-z, dash, underscore and dot", k)
		}
		if strings.HasPrefix(k, "grpc-") {
			return fmt.Errorf("metadata key %q is reserved: keys must not begin with grpc-", k)
		}
		if strings.HasSuffix(k, "-bin") {
			continue
		}
		for _, v := range values {
			if strings.ContainsFunc(v, func(r rune) bool { return r < 0x20 || r > 0x7e }) {
				return fmt.Errorf("metadata value of %q has characters that are not printable ASCII: let the key end in -bin", k)
			}
		}
	}
	return nil
}
