// Package poison overwrites memory that was given back, in builds that look for uses after that. These are race builds
// and builds with the tag poison.
package poison

// Byte is the value of all bytes that were given back.
const Byte = 0xDB

// Fill overwrites b if Enabled.
func Fill(b []byte) {
	if Enabled && len(b) > 0 {
		b[0] = Byte
		for n := 1; n < len(b); n *= 2 {
			copy(b[n:], b[:n])
		}
	}
}
