package stream

// This file counts the records of a stream and their bytes. Readers, writers and the outbox each count their own. Any
// goroutine may call Totals, which takes the lock of the packer. Functions with the suffix Locked need that lock.

// counted is a number of records and of their bytes.
type counted struct{ records, bytes uint64 }

// Totals are the records and bytes that a stream has carried since it was opened, as one end counts them. They never
// become less.
type Totals struct {
	RecordsIn uint64 `json:"records_in"` // records that reads of this end returned
	BytesIn   uint64 `json:"bytes_in"`   // bytes of these records

	RecordsOut uint64 `json:"records_out"` // records that writes of this end accepted
	BytesOut   uint64 `json:"bytes_out"`   // bytes of these records, and of a record that is written in part

	// The part of RecordsOut and BytesOut that the peer's end has acknowledged. The peer's end has received these
	// records, but its user may not have read them. A peer that speaks only the JSON fallback acknowledges nothing.
	RecordsAcked uint64 `json:"records_acked"`
	BytesAcked   uint64 `json:"bytes_acked"`
}

// Totals returns how much the stream has carried, for example for a progress bar: BytesAcked of an upload, BytesIn of a
// download. It may be called at any time, by any goroutine. A goroutine that neither reads nor writes gets recent
// values.
func (st *Stream) Totals() Totals { return st.session.totals() }

// Totals returns how much the stream has carried, in both directions; see [Stream.Totals].
func (r *Request) Totals() Totals { return r.session.totals() }

// Totals returns how much the stream has carried, in both directions; see [Stream.Totals].
func (w *Writer) Totals() Totals { return w.session.totals() }

func (s *session) totals() Totals {
	t := Totals{RecordsIn: s.recv.records.load(), BytesIn: s.recv.bytes.load()}
	if snd := s.send.Load(); snd != nil {
		pk := snd.packer
		pk.mu.Lock()
		out := pk.writtenLocked()
		acked := pk.acknowledged
		pk.mu.Unlock()
		t.RecordsOut, t.BytesOut, t.RecordsAcked, t.BytesAcked = out.records, out.bytes, acked.records, acked.bytes
	}
	return t
}

// count counts a record of n bytes that a read returns.
func (s *session) count(n int) {
	s.recv.records.add(1)
	s.recv.bytes.add(uint64(n))
}

// publishAfter is the number of records after which a reader publishes their count although it never waits.
const publishAfter = 1024

// publishCount adds the records that were read since its last call to the endpoint's, so that reads touch nothing that
// all streams share. The reader calls it when it waits or has read many, and the outbox at the end of the stream.
func (s *session) publishCount() {
	n := uint32(s.recv.records.load())
	if more := int32(n - s.recv.published.Swap(n)); more != 0 { // negative if a later call was faster
		s.ep.counters.records.Add(uint64(int64(more)))
	}
}

// writtenLocked returns what was written, with the records of the open packet.
func (pk *packer) writtenLocked() counted {
	out := pk.written
	if pk.open != nil {
		out.records += uint64(pk.records)
		out.bytes += uint64(pk.n - PacketHeaderSize - FrameHeaderSize*int(pk.records))
	}
	return out
}

// besideLocked takes n bytes out of the count of written bytes: they are in a packet, but belong to no record.
func (pk *packer) besideLocked(n int) { pk.written.bytes -= uint64(n) }

// acknowledgeLocked records that the peer has acknowledged all records and bytes up to through. through is 0 if no
// record ended in the acknowledged packets.
func (pk *packer) acknowledgeLocked(through counted) {
	if through != (counted{}) {
		pk.acknowledged = through
	}
}

// countLocked counts the records of the open packet, which is full or dropped.
func (pk *packer) countLocked() {
	pk.written = pk.writtenLocked()
	pk.records = 0
}
