package jsonwire

import (
	"strings"
	"testing"
)

// Only what JetStream says of a message that it keeps, or refuses, is its acknowledgement.
func TestPubAck(t *testing.T) {
	for text, want := range map[string]bool{
		`{"stream":"AUDIT","seq":1}`:                                                                                true,
		`{"stream":"AUDIT", "seq":18446744073709551615}`:                                                            true,
		`{"stream":"S","seq":0,"domain":"hub","duplicate":true}`:                                                    true,
		`{"stream":"S","seq":5,"batch":"b","count":3,"val":"1","x":[]}`:                                             true,
		`{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"},"stream":"FULL","seq":0}`: true,
		`{"error":{"code":400,"err_code":10071}}`:                                                                   true,
		`{"type":1,"data":"YQ=="}`:                                                                                  false,
		`{"type":1}`:                                                                                                false,
		`{"type":2,"closeError":{"Code":1000,"Text":""}}`:                                                           false,
		`{"type":3,"stream":"AUDIT","seq":1}`:                                                                       false,
		`{"stream":"AUDIT","seq":1,"type":1,"data":"YQ=="}`:                                                         false,
		`{"data":"YQ==","type":1}`:                                                                                  false,
		`{"stream":"","seq":1}`:                                                                                     false,
		`{"stream":"AUDIT"}`:                                                                                        false,
		`{"seq":1}`:                                                                                                 false,
		`{"stream":1,"seq":1}`:                                                                                      false,
		`{"stream":"AUDIT","seq":-1}`:                                                                               false,
		`{"stream":"AUDIT","seq":"1"}`:                                                                              false,
		`{"error":"no"}`:                                                                                            false,
		`{"error":{"code":503}}`:                                                                                    false,
		`{"error":null}`:                                                                                            false,
		`{"stream":"AUDIT","seq":1`:                                                                                 false,
		`[{"stream":"AUDIT","seq":1}]`:                                                                              false,
		`"stream"`:                                                                                                  false,
		`{}`:                                                                                                        false,
		``:                                                                                                          false,
		`{"stream":"AUDIT","seq":1,"x":"` + strings.Repeat("x", maxPubAck) + `"}`: false,
	} {
		if got := IsPubAck([]byte(text)); got != want {
			t.Errorf("%.60s: %v", text, got)
		}
	}
}
