package stream

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/flow"
	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/natsconn/fake"
)

func testBucket(packets uint32, bytes uint64) *bucket {
	b := new(bucket)
	b.init(packets, bytes)
	return b
}

// acceptTest offers a packet to b as the mux does when there is memory for it.
func (b *bucket) acceptTest(data []byte) (verdict, *CloseError) {
	if b.acceptNext(data, nil) {
		return accepted, nil
	}
	v, err := b.accept(data, nil, false)
	if v == noRoom {
		return b.accept(data, nil, true)
	}
	return v, err
}

// grantNext grants more after the windows were resized, if that is due, as a reader does.
func grantNext(b *bucket, ack bool, windows *flow.Windows, largest uint64, free int64) {
	if b.limited {
		b.resize(windows, largest, free)
	}
	b.grant(ack)
}

// granted is the credit that the peer has.
func (b *bucket) granted() credited { return credited{b.grantedPackets.Load(), b.grantedBytes.Load()} }

// wantVerdict fails the test unless v and err are as expected; code is that of a violation.
func wantVerdict(t *testing.T, what string, v verdict, err *CloseError, want verdict, code int) {
	t.Helper()
	got := 0
	if err != nil {
		got = err.Code
	}
	if v != want || got != code {
		t.Errorf("%s: verdict %d, %v; want %d, code %d", what, v, err, want, code)
	}
}

func TestBucketAcceptsPacketsInOrder(t *testing.T) {
	b := testBucket(32, 1<<20)
	cut := testPacket(7, 3, testData("x"), testData("y"))
	cut = cut[:len(cut)-FrameHeaderSize-1]
	for i, step := range []struct {
		what string
		data []byte
		want verdict
	}{
		{"the first packet", testPacket(7, 0, testData("a")), accepted},
		{"the first packet again", testPacket(7, 0, testData("a")), duplicate},
		{"the next packet", testPacket(7, 1, testData("b")), accepted},
		{"another sender", testPacket(8, 2, testData("x")), foreign},
		{"another sender's repeated number", testPacket(8, 0, testData("x")), foreign},
		{"a packet that asks for credit", testPacketFlags(PacketSeq|PacketAck, 7, 2, testData("c")), accepted},
		{"most of a header", testPacket(7, 3)[:PacketHeaderSize-1], malformed},
		{"a packet cut between two frames", cut, malformed},
		{"a packet with a byte too many", append(testPacket(7, 3, testData("x")), 0), malformed},
		{"a cut packet of another sender", testPacket(8, 3, testData("x"))[:PacketHeaderSize], malformed},
		{"the magic alone", []byte{PacketMagic}, malformed},
		{"an envelope", testPacketFlags(PacketSeq|PacketEnv, 7, 3), malformed},
		{"a marked envelope", testPacketFlags(PacketSeq|PacketEnv|PacketMark, 7, 3), malformed},
		{"another version", append([]byte{PacketMagic, 0x21}, testPacket(7, 3)[2:]...), malformed},
		{"the number farthest back", testPacket(7, 3+1<<31, testData("x")), duplicate},
		{"the last of all numbers", testPacket(7, 1<<32-1, testData("x")), duplicate},
		{"the packet after all that", testPacket(7, 3, testData("d")), accepted},
	} {
		v, err := b.acceptTest(step.data)
		wantVerdict(t, fmt.Sprintf("step %d, %s", i, step.what), v, err, step.want, 0)
	}
	for i, want := range []string{"a", "b", "c", "d"} {
		packet, ok := b.ring.Pop()
		if !ok || string(packet.data[PacketHeaderSize+FrameHeaderSize:]) != want {
			t.Errorf("packet %d: %q, %v; want %q", i, packet.data, ok, want)
		}
	}
	if c := b.credit(); c.Ack != 4 {
		t.Errorf("acknowledges %d packets, want 4", c.Ack)
	}
}

// A stranger's bytes as the first message of a stream. Nobody is bound, so they end it.
func TestBucketEndsByAStrangersFirstMessage(t *testing.T) {
	for name, data := range map[string][]byte{
		"the magic alone":    {PacketMagic},
		"most of a header":   testPacket(7, 0)[:PacketHeaderSize-1],
		"a cut packet":       testPacket(7, 0, testData("a"))[:PacketHeaderSize],
		"a byte too many":    append(testPacket(7, 0, testData("a")), 0),
		"another version":    append([]byte{PacketMagic, 0x21}, testPacket(7, 0)[2:]...),
		"an envelope":        testPacketFlags(PacketSeq|PacketEnv, 7, 0, testData("a")),
		"a marked envelope":  testPacketFlags(PacketSeq|PacketEnv|PacketMark, 7, 0, testData("a")),
		"a word of zeros":    binary.BigEndian.AppendUint64(make([]byte, 8), packetTail(0, PacketHeaderSize)), // as acceptWord has before bind
		"all bits of a byte": append([]byte{0xF5}, bytes.Repeat([]byte{0xFF}, PacketHeaderSize)...),
	} {
		b := testBucket(32, 1<<20)
		v, err := b.acceptTest(data)
		wantVerdict(t, name, v, err, violation, CloseUnsupportedData)
		b = testBucket(32, 1<<20)
		v, err = b.acceptControl(data, 0)
		wantVerdict(t, name+" as control", v, err, violation, CloseUnsupportedData)
		if b.ring.Len() != 0 {
			t.Errorf("%s: pushed", name)
		}
	}
}

func TestBucketNoticesGaps(t *testing.T) {
	b := testBucket(32, 1<<20)
	v, err := b.acceptTest(testPacket(7, 0, testData("a")))
	wantVerdict(t, "packet 0", v, err, accepted, 0)
	for _, seq := range []uint32{2, 3, 1<<31 - 1} {
		v, err = b.acceptTest(testPacket(7, seq, testData("c")))
		wantVerdict(t, fmt.Sprint("packet ", seq), v, err, gap, 0)
	}
	if b.ring.Len() != 1 {
		t.Errorf("%d packets pushed, want 1", b.ring.Len())
	}

	b = testBucket(32, 1<<20)
	v, err = b.acceptTest(testPacket(7, 1, testData("b")))
	wantVerdict(t, "packet 1 first", v, err, gap, 0)
	v, err = b.acceptTest(testPacket(8, 0, testData("a")))
	wantVerdict(t, "another sender's", v, err, foreign, 0)
	v, err = b.acceptTest(testPacket(7, 0, testData("a")))
	wantVerdict(t, "the missing one", v, err, accepted, 0)
}

// One request for each packet that is waited for, and another when that was not heard.
func TestBucketAsksOnceForAPacket(t *testing.T) {
	b := testBucket(32, 1<<20)
	const patience = 100
	for _, step := range []struct {
		expect uint32
		now    int64
		want   bool
	}{{0, 0, true}, {0, 50, false}, {0, 99, false}, {0, 100, true}, {0, 150, false}, {1, 151, true}, {1, 152, false}, {1, 251, true}} {
		b.expect = step.expect
		if got := b.shouldAskForGap(step.now, patience); got != step.want {
			t.Errorf("waiting for %d at %d: %v", step.expect, step.now, got)
		}
	}
}

// Numbers wrap at 2^32, in the sequence, in the grant, and in the tests for duplicates and gaps.
func TestBucketSequenceWraps(t *testing.T) {
	for ahead := range uint32(40) {
		start := -ahead
		b := testBucket(32, 1<<20)
		b.expect, b.consumed.packets = start, start
		b.consumed.limit = start + 32
		b.grantedPackets.Store(start + 32)
		for i := range uint32(100) {
			seq := start + i
			p := testPacket(7, seq, testData("x"))
			v, err := b.acceptTest(p)
			wantVerdict(t, fmt.Sprintf("packet %d", seq), v, err, accepted, 0)
			v, err = b.acceptTest(testPacket(7, seq, testData("x")))
			wantVerdict(t, fmt.Sprintf("packet %d again", seq), v, err, duplicate, 0)
			if i > 0 {
				v, err = b.acceptTest(testPacket(7, start, testData("x")))
				wantVerdict(t, fmt.Sprintf("packet %d after %d", start, seq), v, err, duplicate, 0)
				v, err = b.acceptTest(testPacket(7, seq+2, testData("x")))
				wantVerdict(t, fmt.Sprintf("packet %d after %d", seq+2, seq), v, err, gap, 0)
			}
			if i%32 < 20 { // the reader is behind by up to 20 packets, then catches up
				continue
			}
			for {
				packet, ok := b.ring.Pop()
				if !ok {
					break
				}
				if b.consume(len(packet.data), false) {
					grantNext(b, false, nil, 0, 0)
				}
			}
		}
		if left := int32(b.grantedPackets.Load() - b.consumed.packets); left <= 24 || left > 32 {
			t.Fatalf("start %d: %d packets of credit left of a window of 32", start, left)
		}
	}
}

func TestBucketRefusesOverrun(t *testing.T) {
	t.Run("packets", func(t *testing.T) {
		b := testBucket(4, 1<<20)
		for seq := range uint32(4) {
			v, err := b.acceptTest(testPacket(7, seq, testData("x")))
			wantVerdict(t, "within the credit", v, err, accepted, 0)
		}
		v, err := b.acceptTest(testPacket(7, 4, testData("x")))
		wantVerdict(t, "beyond", v, err, violation, CloseProtocolError)
		if b.ring.Len() != 4 {
			t.Errorf("%d packets queued, 4 were granted", b.ring.Len())
		}
	})
	t.Run("bytes", func(t *testing.T) {
		// The byte limit says when the last packet may be opened, not where it ends.
		b := testBucket(32, 100)
		v, err := b.acceptTest(testPacket(7, 0, testData(strings.Repeat("x", 75)))) // 99 bytes
		wantVerdict(t, "99 of 100 bytes", v, err, accepted, 0)
		v, err = b.acceptTest(testPacket(7, 1, testData(strings.Repeat("x", 1000))))
		wantVerdict(t, "the packet that passes the limit", v, err, accepted, 0)
		v, err = b.acceptTest(testPacket(7, 2, testData("")))
		wantVerdict(t, "beyond", v, err, violation, CloseProtocolError)

		b = testBucket(32, 100)
		v, err = b.acceptTest(testPacket(7, 0, testData(strings.Repeat("x", 76))))
		wantVerdict(t, "100 of 100 bytes", v, err, accepted, 0)
		v, err = b.acceptTest(testPacket(7, 1, testData("")))
		wantVerdict(t, "at the limit", v, err, violation, CloseProtocolError)
	})
}

// Docs/PROTOCOL.md section 8, rule 2. Closing never waits for credit, and that is all the
// exception allows.
func TestBucketTakesCloseBeyondCredit(t *testing.T) {
	closing := Frame{Type: FrameClose, Code: CloseNormalClosure, Payload: []byte("bye")}
	fill := func(packets uint32, bytes uint64) *bucket {
		b := testBucket(packets, bytes)
		for seq := range min(packets, 2) {
			if v, err := b.acceptTest(testPacket(7, seq, testData(strings.Repeat("x", 100)))); v != accepted {
				t.Fatal(v, err)
			}
		}
		return b
	}
	for _, limit := range []struct {
		name    string
		packets uint32
		bytes   uint64
	}{{"packets", 2, 1 << 20}, {"bytes", 32, 150}, {"both", 2, 200}} {
		t.Run(limit.name, func(t *testing.T) {
			b := fill(limit.packets, limit.bytes)
			v, err := b.acceptTest(testPacket(7, 2, testData("x"), closing))
			wantVerdict(t, "a record and CLOSE", v, err, violation, CloseProtocolError)

			b = fill(limit.packets, limit.bytes)
			v, err = b.acceptTest(testPacket(7, 2, closing, testData("x")))
			wantVerdict(t, "CLOSE and a record behind it", v, err, violation, CloseProtocolError)

			b = fill(limit.packets, limit.bytes)
			bad := closing
			bad.Code = 999
			v, err = b.acceptTest(testPacket(7, 2, bad))
			wantVerdict(t, "a CLOSE that is none", v, err, violation, CloseProtocolError)

			b = fill(limit.packets, limit.bytes)
			v, err = b.acceptTest(testPacket(7, 2, closing)[:PacketHeaderSize+FrameHeaderSize+1])
			wantVerdict(t, "a packet cut short", v, err, malformed, 0)

			b = fill(limit.packets, limit.bytes)
			v, err = b.acceptTest(testPacket(7, 2, closing))
			wantVerdict(t, "CLOSE", v, err, accepted, 0)
			v, err = b.acceptTest(testPacket(7, 2, closing))
			wantVerdict(t, "the same CLOSE again", v, err, duplicate, 0)
			v, err = b.acceptTest(testPacket(7, 3, closing))
			wantVerdict(t, "a second CLOSE", v, err, violation, CloseProtocolError)
			if b.ring.Len() != 3 {
				t.Errorf("%d packets queued, want 3", b.ring.Len())
			}
		})
	}
	t.Run("alone", func(t *testing.T) { // no credit at all was granted
		b := testBucket(0, 0)
		v, err := b.accept(testPacket(7, 0, closing), nil, false) // whether or not there is room
		wantVerdict(t, "CLOSE", v, err, accepted, 0)
	})
}

// A push never fails for a peer within its credit, up to the largest window and its CLOSE.
func TestBucketRingHoldsWindow(t *testing.T) {
	b := testBucket(maxPackets, 1<<30)
	for seq := range uint32(maxPackets) {
		if v, err := b.acceptTest(testPacket(7, seq, testData("x"))); v != accepted {
			t.Fatal(seq, v, err)
		}
	}
	if v, err := b.acceptTest(testPacket(7, maxPackets, Frame{Type: FrameClose, Code: 1000})); v != accepted {
		t.Fatal(v, err)
	}
	if b.ring.Len() != maxPackets+1 {
		t.Fatalf("%d packets queued, want %d", b.ring.Len(), maxPackets+1)
	}
}

func TestBucketPassesControlPackets(t *testing.T) {
	ping := Frame{Type: FramePing}
	b := testBucket(32, 1<<20)
	v, err := b.acceptControl(testPacketFlags(0, 7, 0, ping), 0)
	wantVerdict(t, "the first packet", v, err, accepted, 0)
	v, err = b.acceptControl(testPacketFlags(0, 8, 0, ping), 0)
	wantVerdict(t, "another sender", v, err, foreign, 0)
	v, err = b.acceptTest(testPacket(8, 0, testData("x")))
	wantVerdict(t, "another sender's data", v, err, foreign, 0)
	v, err = b.acceptControl(testPacketFlags(0, 7, 0, ping)[:5], 0)
	wantVerdict(t, "half a header", v, err, malformed, 0)
	v, err = b.acceptControl(testPacketFlags(0, 7, 0, ping, ping)[:PacketHeaderSize+FrameHeaderSize], 0)
	wantVerdict(t, "a packet cut between two frames", v, err, malformed, 0)
	large := func(n int) []byte {
		return testPacketFlags(0, 7, 0, Frame{Type: 0x80, Payload: make([]byte, n-PacketHeaderSize-FrameHeaderSize)})
	}
	v, err = b.acceptControl(large(maxControlPacket), 0)
	wantVerdict(t, "the largest control packet", v, err, accepted, 0)
	v, err = b.acceptControl(large(maxControlPacket+1), 0)
	wantVerdict(t, "a larger one", v, err, malformed, 0)
	v, err = b.acceptTest(testPacket(7, 0, testData("a")))
	wantVerdict(t, "data after control", v, err, accepted, 0)
	v, err = b.acceptJSON([]byte(`{"type":1}`), 1000)
	wantVerdict(t, "JSON after control", v, err, foreign, 0)
	if b.ring.Len() != 1 {
		t.Errorf("%d packets queued, want 1", b.ring.Len())
	}
}

func TestBucketTakesFallbackMessages(t *testing.T) {
	const limit = 100
	ten := []byte(`{"type":1}`)
	b := testBucket(32, 50) // the credit binds only those who know of it
	for i := range 10 {
		v, err := b.acceptJSON(ten, limit)
		wantVerdict(t, fmt.Sprint("message ", i), v, err, accepted, 0)
	}
	v, err := b.acceptTest(testPacket(7, 0, testData("x")))
	wantVerdict(t, "a packet", v, err, foreign, 0)
	v, err = b.acceptControl(testPacketFlags(0, 7, 0, Frame{Type: FrameReset, Code: 4000}), 0)
	wantVerdict(t, "a control packet", v, err, foreign, 0)
	v, err = b.acceptTest([]byte{PacketMagic, 0x11})
	wantVerdict(t, "half a packet header", v, err, malformed, 0)

	for range 3 {
		packet, _ := b.ring.Pop()
		if b.consume(len(packet.data), false) {
			t.Error("a fallback peer is to be granted credit")
		}
	}
	for i := range 3 {
		v, err = b.acceptJSON(ten, limit)
		wantVerdict(t, fmt.Sprintf("message %d after three were read", i), v, err, accepted, 0)
	}
	v, err = b.acceptJSON(ten, limit)
	wantVerdict(t, "a message beyond the limit", v, err, violation, CloseTooSlow)
	if b.ring.Len() != 10 {
		t.Errorf("%d messages queued, want 10", b.ring.Len())
	}

	b = testBucket(32, 50)
	v, err = b.acceptJSON(make([]byte, limit+1), limit)
	wantVerdict(t, "one message larger than the limit", v, err, violation, CloseTooSlow)
}

// When the peer is granted more, and how much.
func TestBucketGrantsCreditInTime(t *testing.T) {
	const size = 1000
	// read consumes packets until the bucket grants more, and returns how many.
	read := func(t *testing.T, b *bucket, size int, ack bool) int {
		t.Helper()
		windows := newWindows(defaultMaxBuffered)
		for n := 1; n < 10_000; n++ {
			if b.consume(size, ack) {
				grantNext(b, ack, windows, defaultWindow, defaultMaxBuffered)
				if b.grantedPackets.Load() != b.consumed.limit {
					t.Fatal("what the mux sees is not what the reader granted")
				}
				if want := (credited{b.consumed.packets + uint32(b.windowPackets), b.consumed.bytes + b.window.Bytes}); b.granted() != want {
					t.Fatalf("granted %v, want a window beyond what was consumed: %v", b.granted(), want)
				}
				return n
			}
		}
		t.Fatal("no credit after 10,000 packets")
		return 0
	}

	t.Run("a quarter of the packets", func(t *testing.T) {
		b := testBucket(32, 1<<30)
		for range 10 {
			if n := read(t, b, size, false); n != 8 {
				t.Fatalf("granted after %d packets of a window of 32, want 8", n)
			}
		}
	})
	t.Run("a quarter of the bytes", func(t *testing.T) {
		b := testBucket(256, 64<<10)
		for range 10 {
			if n := read(t, b, size, false); n != 17 { // 16,384 bytes are a quarter
				t.Fatalf("granted after %d packets of 1000 bytes, want 17", n)
			}
		}
	})
	t.Run("one packet larger than the window", func(t *testing.T) {
		b := testBucket(32, 4<<10)
		if n := read(t, b, 1<<20, false); n != 1 {
			t.Fatalf("granted after %d packets", n)
		}
	})
	t.Run("grows only where the window holds the sender back", func(t *testing.T) {
		for _, c := range []struct{ limited, dry, grows bool }{
			{false, false, false}, {true, false, false}, {false, true, false}, {true, true, true},
		} {
			b := testBucket(32, 256<<10)
			b.limited, b.ranDry = c.limited, c.dry
			read(t, b, size, false)
			if grew := b.windowPackets > 32 || b.window.Bytes > 256<<10; grew != c.grows {
				t.Errorf("sender limited %v, reader dry %v: windows %d packets, %d bytes", c.limited, c.dry, b.windowPackets, b.window.Bytes)
			}
			if b.limited || b.ranDry {
				t.Errorf("limited %v, dry %v: not forgotten after the grant", b.limited, b.ranDry)
			}
		}
	})
	t.Run("grows when the reader runs dry after the last packet of the credit", func(t *testing.T) {
		b := testBucket(32, 256<<10)
		read(t, b, size, true)
		b.ranDry = true
		read(t, b, size, false)
		if got, want := (credited{uint32(b.windowPackets), b.window.Bytes}), (credited{64, 512 << 10}); got != want {
			t.Errorf("windows %v, want %v", got, want)
		}
	})
	t.Run("doubles up to the largest", func(t *testing.T) {
		b := testBucket(32, 256<<10)
		for _, want := range []credited{{64, 512 << 10}, {128, 1 << 20}, {256, 2 << 20}, {256, 4 << 20}, {256, 4 << 20}} {
			b.ranDry = true
			read(t, b, size, true)
			if got := (credited{uint32(b.windowPackets), b.window.Bytes}); got != want {
				t.Fatalf("windows %v, want %v", got, want)
			}
		}
	})
	t.Run("no memory is left", func(t *testing.T) {
		b, windows := testBucket(32, 256<<10), newWindows(defaultMaxBuffered)
		for range 5 {
			b.ranDry = true
			for !b.consume(size, true) {
			}
			grantNext(b, true, windows, defaultWindow, 0)
		}
		if b.window.Bytes > 256<<10 {
			t.Errorf("window of %d bytes without memory", b.window.Bytes)
		}
	})
	t.Run("a limit never goes back", func(t *testing.T) {
		b := testBucket(32, 256<<10)
		b.window.Bytes /= 16
		for range 100 {
			before := b.granted()
			if b.consume(size, false) {
				grantNext(b, false, nil, 0, 0)
			}
			if after := b.granted(); after.bytes < before.bytes || int32(after.packets-before.packets) < 0 {
				t.Fatalf("granted %v after %v", after, before)
			}
		}
	})
}

// TestBucketCreditNeverStarvesNorOverruns plays a sender that uses its credit to the full, and a reader, in random
// turns: the sender is never refused, the grant never goes back and never exceeds a window beyond what was consumed,
// and nobody starves.
func TestBucketCreditNeverStarvesNorOverruns(t *testing.T) {
	seeds := uint64(100)
	if testing.Short() {
		seeds /= 10
	}
	for seed := range seeds {
		r := rand.New(rand.NewPCG(seed, 1))
		bytes := uint64(minWindow) << r.IntN(7)
		b := testBucket(initialPackets, bytes)
		free := int64(r.IntN(64 << 20))
		windows := newWindows(64 << 20)
		known := Credit{Packets: initialPackets, Bytes: bytes} // what the sender knows
		var seq, read uint32
		var sent uint64
		sizes := 1 << (4 + r.IntN(12))
		for seq < 1000 {
			switch r.IntN(3) {
			case 0: // a CREDIT arrives, perhaps late: only sometimes
				c := b.credit()
				if int32(c.Packets-known.Packets) < 0 || c.Bytes < known.Bytes || c.Ack != seq {
					t.Fatalf("seed %d: CREDIT %+v after %+v, %d sent", seed, c, known, seq)
				}
				known = c
			case 1:
				for range r.IntN(100) {
					if int32(seq-known.Packets) >= 0 || sent >= known.Bytes {
						break
					}
					p := testPacket(7, seq, Frame{Type: FrameData, Payload: make([]byte, r.IntN(sizes))})
					if seq++; int32(seq-known.Packets) >= 0 || sent+uint64(len(p)) >= known.Bytes {
						p[1] |= byte(PacketAck)
					}
					sent += uint64(len(p))
					if v, err := b.acceptTest(p); v != accepted {
						t.Fatalf("seed %d: packet %d within %+v: verdict %d, %v", seed, seq-1, known, v, err)
					}
					if b.ring.Pushed() != seq {
						t.Fatalf("seed %d: packet %d did not find room", seed, seq-1)
					}
				}
			case 2:
				for range r.IntN(100) {
					packet, ok := b.ring.Pop()
					if !ok {
						b.ranDry = true
						break
					}
					read++
					before := b.granted()
					if ack := packet.data[1]&byte(PacketAck) != 0; b.consume(len(packet.data), ack) {
						grantNext(b, ack, windows, 1<<20, free)
					}
					after := b.granted()
					if int32(after.packets-before.packets) < 0 || after.bytes < before.bytes {
						t.Fatalf("seed %d: the grant went back from %v to %v", seed, before, after)
					}
					if d := after.packets - read; d > maxPackets {
						t.Fatalf("seed %d: granted %d packets beyond what was consumed", seed, d)
					}
					if d := int64(after.bytes - b.consumed.bytes); d > 1<<20 {
						t.Fatalf("seed %d: granted %d bytes beyond what was consumed", seed, d)
					}
				}
			}
		}
	}
}

// Each kind of message that is dropped is counted where it belongs, and no other stream is touched.
func TestMuxCountsWhatItDrops(t *testing.T) {
	conn := fake.New()
	c := fakeClient(t, conn, ClientParams{})
	s, deliver := muxStream(t, conn, c)
	deliver(testPacket(7, 0, testData("a")))
	for _, step := range []struct {
		what  string
		data  []byte
		count func(*Stats) *uint64
	}{
		{"a duplicate", testPacket(7, 0, testData("a")), func(s *Stats) *uint64 { return &s.DroppedDuplicate }},
		{"a foreign packet", testPacket(8, 1, testData("x")), func(s *Stats) *uint64 { return &s.DroppedForeign }},
		{"a foreign control packet", testPacketFlags(0, 8, 1, Frame{Type: FrameReset, Code: 4000}), func(s *Stats) *uint64 { return &s.DroppedForeign }},
		{"JSON", []byte(`{"type":2,"closeError":{"Code":1000,"Text":""}}`), func(s *Stats) *uint64 { return &s.DroppedForeign }},
		{"text", []byte("hello"), func(s *Stats) *uint64 { return &s.DroppedForeign }},
		{"half a header", []byte{PacketMagic, 0x11, 0}, func(s *Stats) *uint64 { return &s.DroppedMalformed }},
		{"half a control header", []byte{PacketMagic, 0x10, 0}, func(s *Stats) *uint64 { return &s.DroppedMalformed }},
		{"the magic alone", []byte{PacketMagic}, func(s *Stats) *uint64 { return &s.DroppedMalformed }},
		{"a cut packet", testPacket(7, 1, testData("x"), testData("y"))[:PacketHeaderSize+FrameHeaderSize+1], func(s *Stats) *uint64 { return &s.DroppedMalformed }},
	} {
		want := c.Stats()
		*step.count(&want)++
		deliver(step.data)
		if got := c.Stats(); got != want {
			t.Errorf("%s: counters\n%+v, want\n%+v", step.what, got, want)
		}
	}
	want := c.Stats()
	want.DroppedUnknown++
	conn.Deliver(&nats.Msg{Subject: c.ep.prefix + "~1m5I00000000000", Data: testPacket(7, 0, testData("x"))})
	if got := c.Stats(); got != want {
		t.Errorf("an unknown token: counters\n%+v, want\n%+v", got, want)
	}
	deliver(testPacket(7, 1, testData("b"), Frame{Type: FrameClose, Code: CloseNormalClosure}))
	for _, want := range []string{"a", "b"} {
		if rec, err := s.Recv(); string(rec) != want || err != nil {
			t.Errorf("%q, %v; want %q", rec, err, want)
		}
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Error(err)
	}
}

// A fallback peer overran the limit; the reader frees room before the stream is taken out
// of the mux. It must not see a record from behind the one that was dropped.
func TestMuxDeliversNothingAfterTheEnd(t *testing.T) {
	conn := fake.New()
	// The outbox is kept busy, so that the stream stays registered.
	busy, idle := make(chan struct{}), make(chan struct{})
	begin := sync.OnceFunc(func() { close(busy) }) // at the end it is told that the client is closed
	conn.Requested = func(*nats.Msg) error { return nil }
	conn.Published = func(string, string, []byte) error { begin(); <-idle; return nil }
	c := fakeClient(t, conn, ClientParams{FallbackBuffer: 60})
	s, deliver := muxStream(t, conn, c)
	message := func(rec string) []byte { return jsonwire.AppendData(nil, []byte(rec)) } // 24 bytes each
	other := unopenedStream(c.ep)
	other.out.peer = "other"
	other.mark(workCredit)
	<-busy
	defer close(idle)

	for _, rec := range []string{"a", "b", "lost"} {
		deliver(message(rec))
	}
	for _, want := range []string{"a", "b"} {
		rec, err := s.Recv()
		if string(rec) != want || err != nil {
			t.Fatalf("%q, %v; want %q", rec, err, want)
		}
		deliver(message("late"))
	}
	rec, err := s.Recv()
	ce, ok := errors.AsType[*CloseError](err)
	if !ok || ce.Code != CloseTooSlow {
		t.Fatalf("%q, %v; want close %d", rec, err, CloseTooSlow)
	}
}

// A message of the original protocol is none of frames, whatever it looks like.
func TestFallbackMessageIsNotParsedAsFrames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		stop, err := m.back.Subscribe("old", "", func(msg *nats.Msg) {
			_ = m.back.Publish(msg.Reply, "", AppendFrame(nil, testData("forged")))
		})
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		s := m.open(t, "old")
		if _, err := s.Header(); err != nil {
			t.Fatal(err)
		}
		rec, err := s.Recv()
		if !errors.Is(err, &CloseError{Code: CloseUnsupportedData}) {
			t.Errorf("Recv: %q, %v", rec, err)
		}
		_ = s.Close()
	})
}

// The records that consumers send to handlers that do not read are bounded as well.
func TestHandlersWindowsAreBounded(t *testing.T) {
	for _, c := range []struct {
		name    string
		p       ClientParams
		streams int
		most    int
	}{
		{"Window", ClientParams{Window: minWindow}, 1, minWindow},
		{"MaxBuffered", ClientParams{MaxBuffered: 256 << 10}, 100, 256<<10 + 100*minWindow},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, c.p)
				m.handle(t, "deaf", func(_ *Writer, r *Request) error {
					<-r.Context().Done()
					return nil
				})
				var sent atomic.Int64
				const record = 1000
				for range c.streams {
					s := m.open(t, "deaf")
					go func() {
						for {
							if _, err := s.Write(make([]byte, record)); err != nil {
								return
							}
							if s.Flush() == nil {
								sent.Add(record)
							}
						}
					}()
				}
				time.Sleep(time.Second)
				reserved := int(m.server.Stats().Reserved) + c.streams*minWindow
				if reserved > c.most {
					t.Errorf("%d bytes may be held, should be at most %d", reserved, c.most)
				}
				if n, most := int(sent.Load()), reserved+2*c.streams*record; n == 0 || n > most { // a packet beyond the window, and one not sent
					t.Errorf("%d bytes were sent to handlers that do not read, of which %d may be held", n, reserved)
				}
				m.close()
				m.nothingLeft(t)
			})
		})
	}
}

// Credit that is due before the outbox knows where the producer is goes out once it does: with a window of one packet
// both ends would wait for ever otherwise.
func TestCreditDueBeforePeerIsKnownIsSentLater(t *testing.T) {
	conn := newRecorder(nil)
	c := fakeClient(t, conn.Conn, ClientParams{})
	s, err := c.Open(t.Context(), "subject", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.session.mark(workCredit)
	until(t, "the outbox has served the mark", func() bool { return s.session.pending.Load() == 0 })
	data := Frame{Type: FrameData, Payload: []byte("a")}
	conn.Deliver(&nats.Msg{Subject: s.session.reply(), Reply: "producer", Data: testPacketFlags(PacketSeq, 9, 0, data)})
	until(t, "credit was sent", func() bool {
		for _, m := range conn.sent() {
			if m.Subject == "producer" {
				return true
			}
		}
		return false
	})
}

// A large record of one stream does not hold up small ones of another: its pieces and their packets take turns.
func TestLargeAndSmallRecordsTakeTurns(t *testing.T) {
	const piece = 16 << 10
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		release := make(chan struct{})
		send := func(size int) Handler {
			return func(w *Writer, _ *Request) error {
				if _, err := w.Write(nil); err != nil { // the consumer is bound
					return err
				}
				<-release
				for range max(1, 600_000/size) {
					if _, err := w.Write(make([]byte, size)); err != nil {
						return err
					}
				}
				return nil
			}
		}
		m.handle(t, "large", send(1<<20))
		m.handle(t, "small", send(1000))
		large, small := m.open(t, "large"), m.open(t, "small")
		synctest.Wait()
		// While the connection is down both fill their credit. All is sent when it comes back, by one goroutine: in
		// which order depends on nothing else.
		m.back.Set(nats.RECONNECTING)
		synctest.Wait()
		m.server.ep.maxPayload.Store(piece) // so that many pieces fit the credit
		close(release)
		synctest.Wait()
		var order strings.Builder
		m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
			if from == m.back && isSequenced(msg.Data) {
				order.WriteString(map[string]string{large.session.reply(): "L", small.session.reply(): "s"}[msg.Subject])
			}
			return true
		})
		m.back.Set(nats.CONNECTED)
		synctest.Wait()
		m.bus.SetFilter(nil)
		got := order.String()
		n := min(strings.Count(got, "L"), strings.Count(got, "s"))
		if n < initialWindow/piece-1 {
			t.Fatalf("packets went in the order %s: too few to tell", got)
		}
		// At the beginning a session may be queued and wait for the connection at the same time: it has two turns once.
		turns := got[:2*(n-1)]
		if doubles := strings.Count(turns, "LL") + strings.Count(turns, "ss"); doubles > 2 || strings.Contains(turns, "LLL") || strings.Contains(turns, "sss") {
			t.Errorf("packets went in the order %s", got)
		}
		for _, s := range []*Stream{large, small} {
			for _, err := range s.All() {
				if err != nil {
					t.Fatal(err)
				}
			}
		}
		m.nothingLeft(t)
	})
}

// A stream whose peer floods it with control packets has a few of them waiting, and leaves the others room and turns.
func TestControlFloodTakesItsShare(t *testing.T) {
	const flood = 2 * maxInbound
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		ended := make(chan error, 2)
		m.handle(t, "svc", waits(ended))
		hostile, honest := m.open(t, "svc"), m.open(t, "svc")
		synctest.Wait()
		subject := func(s *Stream) string { return s.session.out.peer }
		release := m.hold()
		before := m.server.Stats().DroppedControl
		ping := hostile.controlPacket(Frame{Type: FramePing})
		for range flood {
			m.server.ep.receive(&nats.Msg{Subject: subject(hostile), Data: ping}, nil)
		}
		if n := m.server.ep.outbox.inbound.Len(); n > maxControls {
			t.Errorf("%d control words of one stream wait, want at most %d", n, maxControls)
		}
		if n := m.server.Stats().DroppedControl - before; n != flood-maxControls {
			t.Errorf("%d control packets were counted as dropped of %d", n, flood)
		}
		m.server.ep.receive(&nats.Msg{Subject: subject(honest), Reply: honest.session.reply(), Data: honest.controlPacket(Frame{Type: FramePing})}, nil)
		if n := m.server.Stats().DroppedControl - before; n != flood-maxControls {
			t.Errorf("a control packet of another stream was dropped")
		}
		answers := map[string]int{}
		published := m.back.Published
		m.back.Published = func(to, reply string, data []byte) error {
			if isFrame(data, FrameCredit) {
				answers[to]++
			}
			return published(to, reply, data)
		}
		release()
		if answers[honest.session.reply()] == 0 {
			t.Error("the other stream was not answered")
		}
		if n := answers[hostile.session.reply()]; n > maxControls {
			t.Errorf("%d answers to %d questions that were taken", n, maxControls)
		}
		// There is room again.
		dropped := m.server.Stats().DroppedControl
		m.server.ep.receive(&nats.Msg{Subject: subject(hostile), Data: ping}, nil)
		synctest.Wait()
		if m.server.Stats().DroppedControl != dropped {
			t.Error("there is no room again")
		}
		for _, s := range []*Stream{hostile, honest} {
			_ = s.Close()
			synctest.Wait()
			<-ended
		}
		m.nothingLeft(t)
	})
}

// Control packets and reply subjects that wait for an outbox which is held in a publish take no more than a bound in
// bytes, those of strangers a quarter of it.
func TestControlWordsAreBoundedInBytes(t *testing.T) {
	long := strings.Repeat("r", 4000)
	for name, c := range map[string]struct {
		stranger bool
		word     control
		most     int // that wait
	}{
		"packets of streams":   {false, control{packet: make([]byte, maxControlPacket)}, maxInboundBytes / maxControlPacket},
		"replies to streams":   {false, control{reply: long}, maxInboundBytes / len(long)},
		"short, of streams":    {false, control{absent: true}, maxInbound},
		"replies of strangers": {true, control{reply: long}, maxInboundBytes / 4 / len(long)},
		"short, of strangers":  {true, control{reply: "r"}, maxInbound/4 + 1},
	} {
		t.Run(name, func(t *testing.T) {
			o := new(outbox)
			o.init(&endpoint{})
			var s *session
			for i := range 2 * maxInbound {
				if i%maxControls == 0 && !c.stranger {
					s = new(session)
				}
				c.word.session = s
				o.deliver(c.word)
			}
			n := o.inbound.Len()
			if n > c.most || n < c.most*9/10 {
				t.Errorf("%d wait, want at most %d", n, c.most)
			}
			if n, dropped := 2*maxInbound-n, o.ep.counters.overrun.Load(); dropped != uint64(n) {
				t.Errorf("%d are counted as dropped, want %d", dropped, n)
			}
		})
	}
}

// A stream publishes in proportion to the packets that it receives: an answer for each question that it takes, and for
// requests to send again no more than is under way, and a packet or two each after that.
func TestFloodsAreAnsweredOnce(t *testing.T) {
	const packets = 30 // that the handler has sent, and that nobody acknowledged
	credit := func(ack int, flags FrameFlags) Frame {
		return Frame{Type: FrameCredit, Flags: flags, Payload: AppendCredit(nil, Credit{Ack: uint32(ack), Packets: packets + 2, Bytes: initialWindow})}
	}
	for name, c := range map[string]struct {
		frame       func(i int) Frame
		n           int
		least, most int64 // messages out
	}{
		"PING":                       {func(int) Frame { return Frame{Type: FramePing} }, 1000, 1000, 1000},
		"CREDIT of nothing":          {func(int) Frame { return credit(0, 0) }, 1000, 0, 0},
		"GAP, the same again":        {func(int) Frame { return credit(0, FlagGap) }, 1000, 1, packets + 1},
		"GAP, a packet further each": {func(i int) Frame { return credit(i+1, FlagGap) }, packets, 1, 2*packets + packets},
		"GAP, back and forth":        {func(i int) Frame { return credit(i/2*(i%2), FlagGap) }, 2 * packets, 1, 2*packets + packets},
		"CREDIT, acknowledging":      {func(i int) Frame { return credit(i+1, 0) }, packets, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.handle(t, "svc", func(w *Writer, r *Request) error {
					for range packets {
						if _, err := w.Write([]byte("x")); err != nil {
							return err
						}
						if err := w.Flush(); err != nil {
							return err
						}
					}
					<-r.Context().Done()
					return nil
				})
				s := m.open(t, "svc")
				synctest.Wait()
				m.bus.SetFilter(func(from, _ *fake.Conn, _ *nats.Msg) bool { return from != m.conn }) // the test is the consumer now
				subject := s.session.out.peer
				m.sentBack.take()
				for i := range c.n {
					m.server.ep.receive(&nats.Msg{Subject: subject, Data: s.controlPacket(c.frame(i))}, nil)
					synctest.Wait()
				}
				if all, _ := m.sentBack.take(); all < c.least || all > c.most {
					t.Errorf("%d messages for %d, want %d to %d", all, c.n, c.least, c.most)
				}
				m.bus.SetFilter(nil)
				_ = s.Close()
				synctest.Wait()
				m.nothingLeft(t)
			})
		})
	}
}

// Packets of streams do not wait until all control packets of others are acted on: they take turns.
func TestControlTakesTurnsWithStreams(t *testing.T) {
	const hostile, honest = 500, 10
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "flood", waits(make(chan error, hostile)))
		begin := make(chan struct{})
		m.handle(t, "svc", func(w *Writer, _ *Request) error {
			<-begin
			_, err := w.Write([]byte("x"))
			return err
		})
		var floods, streams []*Stream
		for range hostile {
			floods = append(floods, m.open(t, "flood"))
		}
		for range honest {
			streams = append(streams, m.open(t, "svc"))
		}
		synctest.Wait()
		release := m.hold()
		o := &m.server.ep.outbox
		gap := Frame{Type: FrameCredit, Flags: FlagGap, Payload: AppendCredit(nil, Credit{Packets: 32, Bytes: initialWindow})}
		for range maxControls {
			for _, s := range floods {
				m.server.ep.receive(&nats.Msg{Subject: s.session.out.peer, Data: s.controlPacket(gap, Frame{Type: FramePing})}, nil)
			}
		}
		waiting := o.inbound.Len()
		close(begin)
		synctest.Wait() // the handlers have written
		sent, most := 0, 0
		published := m.back.Published
		m.back.Published = func(to, reply string, data []byte) error {
			if isSequenced(data) {
				sent, most = sent+1, waiting-o.inbound.Len()
			}
			return published(to, reply, data)
		}
		release()
		if sent < honest || waiting < hostile*maxControls {
			t.Fatalf("%d packets beside %d control words", sent, waiting)
		}
		if limit := waiting / 10; most > limit {
			t.Errorf("the last packet came after %d of %d control words, want at most %d", most, waiting, limit)
		}
		for _, s := range streams {
			if err := drain(s.Recv); err != nil {
				t.Error(err)
			}
		}
		for _, s := range floods {
			_ = s.Close()
		}
		m.nothingLeft(t)
	})
}

// A CREDIT that changes nothing, and a request that repeats another, cost the same however much the peer left
// unacknowledged: the outbox looks at none of the packets.
func TestRepeatedControlLooksAtNoPacket(t *testing.T) {
	const packets = 1000
	p, err := ClientParams{AckTimeout: time.Hour}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	ep := &endpoint{conn: fake.New(), times: p.intervals(), started: time.Now()}
	ep.outbox.init(ep)
	ep.initTime()
	o := &ep.outbox
	o.clock.Start(ep.now())
	snd := &sender{session: &session{ep: ep, role: lifecycle.Handler}, packer: new(packer)}
	for range packets {
		snd.unacked.Push(nil) // to look at one would panic
	}
	q := &snd.unacked.Unacked
	if again, lost := q.Again(0, o.time(), 0); !again || lost != packets {
		t.Fatal(again, lost)
	}
	for range packets / 2 { // published again
		q.Resent()
	}
	for name, c := range map[string]struct {
		ack     uint32
		missing bool
	}{
		"CREDIT of nothing":         {0, false},
		"GAP, the same again":       {0, true},
		"GAP, from an older packet": {1<<32 - 5, true},
	} {
		if err := o.takeCredit(snd, Credit{Ack: c.ack}, c.missing); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A consumer learns that its producer takes no records however many control packets come before.
func TestOneWayIsLearnedBesideAFlood(t *testing.T) {
	c, conn, stick, release := stuckOutbox(t)
	_, deliverOther := muxStream(t, conn.Conn, c)
	s, deliver := muxStream(t, conn.Conn, c)
	stick()
	for range maxInbound {
		deliverOther(testPacketFlags(0, 7, 0, Frame{Type: FramePing}))
	}
	deliver(jsonwire.AppendData(nil, []byte("a")))
	release()
	if _, err := s.Write([]byte("x")); !errors.Is(err, ErrOneWay) {
		t.Errorf("Write: %v", err)
	}
	_ = s.Close()
}

// Where the mux is faster than the outbox, control packets are dropped and counted, as NATS may lose them, and streams
// go on: what they said is asked for.
func TestFullInboundRingDropsAndGoesOn(t *testing.T) {
	busy, idle := make(chan struct{}), make(chan struct{})
	conn := newRecorder(func(_ int, data []byte) error {
		if bytes.Contains(data, []byte("stuck")) {
			close(busy)
			<-idle
		}
		return nil
	})
	c := fakeClient(t, conn.Conn, ClientParams{})
	s, _ := muxStream(t, conn.Conn, c)
	var others []*Stream // as many as can fill the ring
	var fill []func([]byte)
	for range maxInbound / maxControls {
		other, deliver := muxStream(t, conn.Conn, c)
		others, fill = append(others, other), append(fill, deliver)
	}
	w, stuck := c.NewWriter(consumerSubject(5)), c.NewWriter("y"+consumerSubject(5))
	if _, err := w.Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil { // it is registered
		t.Fatal(err)
	}
	if _, err := stuck.Write([]byte("stuck")); err != nil {
		t.Fatal(err)
	}
	<-busy
	ping := testPacketFlags(0, 7, 0, Frame{Type: FramePing})
	for _, deliver := range fill {
		for range maxControls {
			deliver(ping)
		}
	}
	if n := c.Stats().DroppedControl; n != 0 {
		t.Fatalf("%d control packets were dropped before the ring was full", n)
	}
	credit := testPacketFlags(0, 9, 0, Frame{Type: FrameCredit, Payload: AppendCredit(nil, Credit{Ack: 1, Packets: 99, Bytes: 1 << 40})})
	conn.Deliver(&nats.Msg{Subject: w.session.reply(), Data: credit})
	conn.Deliver(&nats.Msg{Subject: s.session.reply(), Reply: "producer", Data: testPacket(9, 0, testData("hi"))})
	if n := c.Stats().DroppedControl; n != 2 {
		t.Errorf("%d control packets were counted as dropped, want 2", n)
	}
	close(idle)

	if rec, err := s.Recv(); string(rec) != "hi" || err != nil {
		t.Errorf("%q, %v; want the record that arrived", rec, err)
	}
	until(t, "the writer asks", func() bool {
		for _, m := range conn.sent() {
			if m.Subject == w.subject && m.Reply != "" && bytes.Contains(m.Data, []byte{byte(FramePing), 0, 0, 0, 0, 0, 0, 0}) {
				return true
			}
		}
		return false
	})
	conn.Deliver(&nats.Msg{Subject: w.session.reply(), Data: credit})
	conn.Deliver(&nats.Msg{Subject: s.session.reply(), Reply: "producer", Data: testPacket(9, 1, testData("more"), Frame{Type: FrameClose, Code: CloseNormalClosure})})
	if rec, err := s.Recv(); string(rec) != "more" || err != nil {
		t.Errorf("%q, %v; want what came afterwards", rec, err)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("the stream ended with %v", err)
	}
	if err := w.Sync(t.Context()); err != nil {
		t.Errorf("the writer did not hear that its packet arrived: %v", err)
	}
	for _, w := range []*Writer{w, stuck} {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, other := range others {
		_ = other.Close()
	}
}

// A message that no stream takes, and a request that is refused, is answered with one message at most, and not at all
// if it names no subject for that.
func TestStrangersAreAnsweredOnce(t *testing.T) {
	const n, inbox = 200, "_SINBOX.stranger.~1m5I00000000001"
	open := nats.Header{headerOpen: {"~1m5I"}}
	packet := AppendPacket(nil, PacketHeader{Flags: PacketSeq, Sender: 7}, testData("x"))
	early := bytes.Clone(packet) // gets the consumer's sender number
	name := AppendPacket(nil, PacketHeader{}, Frame{Type: FrameResume, Payload: []byte("~1m5G00000000001")})
	for title, c := range map[string]struct {
		msg  nats.Msg
		most int64
	}{
		"unknown token":              {nats.Msg{Subject: "unknown", Reply: "a", Data: packet}, n},
		"unknown token, no reply":    {nats.Msg{Subject: "unknown", Data: packet}, 0},
		"unknown token, no packet":   {nats.Msg{Subject: "unknown", Reply: "a", Data: []byte("x")}, 0},
		"another sender":             {nats.Msg{Subject: "stream", Reply: "a", Data: packet}, n},
		"another sender, no reply":   {nats.Msg{Subject: "stream", Data: packet}, 0},
		"early packets":              {nats.Msg{Subject: "stream", Data: early}, 1},
		"no packet for a stream":     {nats.Msg{Subject: "stream", Reply: "a", Data: []byte("{}")}, 0},
		"request for the fallback":   {nats.Msg{Subject: "svc", Reply: "a.b"}, n},
		"request of no time":         {nats.Msg{Subject: "svc", Reply: inbox, Header: nats.Header{headerOpen: {"~1m5I"}, headerTimeout: {"x"}}}, n},
		"request without reply":      {nats.Msg{Subject: "svc", Header: open}, 0},
		"request of a later version": {nats.Msg{Subject: "svc", Reply: inbox, Header: nats.Header{headerOpen: {"~2"}}}, 0},
		"request to a full server":   {nats.Msg{Subject: "full", Reply: inbox, Header: open}, n},
		"name of no stream":          {nats.Msg{Subject: "svc", Reply: inbox, Data: name}, 0},
	} {
		t.Run(title, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.server.stays = true
				m.handle(t, "svc", waits(make(chan error, 1)))
				m.handle(t, "full", waits(make(chan error, 1)))
				s := m.open(t, "svc")
				synctest.Wait()
				switch msg := &c.msg; msg.Subject {
				case "unknown":
					msg.Subject = m.server.ep.prefix + "x"
				case "stream":
					msg.Subject = s.session.out.peer
					_, err := s.Write([]byte("x")) // binds the stream to its sender
					if err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
					if title == "early packets" {
						putPacketHeader(msg.Data, PacketSeq, s.session.senderNumber, 9, len(msg.Data))
					}
				case "full":
					m.server.room.handlers = 1
				}
				m.sentBack.take()
				for range n {
					if err := m.conn.PublishMsg(&c.msg); err != nil {
						t.Fatal(err)
					}
				}
				synctest.Wait()
				if all, _ := m.sentBack.take(); all > c.most {
					t.Errorf("%d messages for %d, want at most %d", all, n, c.most)
				}
				m.server.room.handlers = defaultMaxStreams
				_ = s.Close()
				synctest.Wait()
				m.nothingLeft(t)
			})
		})
	}
}

// A reader that never waits publishes the count of its records all the same, also that of a peer that speaks the fallback.
func TestRecordsOfABusyReaderAreCounted(t *testing.T) {
	const perPacket, packets = 100, 200
	frames := make([]Frame, perPacket)
	for i := range frames {
		frames[i] = Frame{Type: FrameData}
	}
	for _, c := range []struct {
		name    string
		message func(seq uint32) []byte
		records int // of a message
	}{
		{"packets", func(seq uint32) []byte { return testPacket(7, seq, frames...) }, perPacket},
		{"fallback", func(uint32) []byte { return jsonwire.AppendData(nil, []byte("a")) }, 1},
	} {
		conn := benchConn(false)
		client := fakeClient(t, conn, ClientParams{})
		s, deliver := muxStream(t, conn, client)
		deliver(c.message(0))
		var read, most uint64
		for seq := range uint32(packets * perPacket / c.records) {
			deliver(c.message(seq + 1)) // so a message always waits
			for range c.records {
				if _, err := s.Recv(); err != nil {
					t.Fatal(err)
				}
				read++
				most = max(most, read-client.Stats().RecordsReceived)
			}
		}
		if want := uint64(publishAfter + c.records); most > want {
			t.Errorf("%s: up to %d records were missing in Stats, want at most %d", c.name, most, want)
		}
	}
}
