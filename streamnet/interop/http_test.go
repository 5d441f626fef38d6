package interop

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
)

// onHTTP runs f with a web server on each network and for each protocol.
func onHTTP(t *testing.T, h func(n network) http.Handler, f func(t *testing.T, n network, web *httptest.Server, major int)) {
	for _, p := range []struct {
		name       string
		tls        bool
		major      int // of the version of HTTP
		configured func(*http.Protocols)
	}{
		{"HTTP1", false, 1, func(p *http.Protocols) { p.SetHTTP1(true) }},
		{"h2c", false, 2, func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) }},
		{"HTTP2+TLS", true, 2, func(p *http.Protocols) { p.SetHTTP2(true) }},
	} {
		t.Run("protocol="+p.name, func(t *testing.T) {
			onNetworks(t, func(t *testing.T, n network) {
				var protocols http.Protocols
				p.configured(&protocols)
				web := httptest.NewUnstartedServer(h(n))
				_ = web.Listener.Close() // of TCP
				web.Listener = n.listener
				web.Config.Protocols = &protocols
				if web.EnableHTTP2 = p.tls; p.tls {
					web.StartTLS()
					web.URL = "https://example.com" // the name in the certificate
				} else {
					web.Start()
				}
				t.Cleanup(web.Close)
				transport := web.Client().Transport.(*http.Transport)
				transport.DialContext, transport.Protocols = n.dial, &protocols
				web.Client().Timeout = patience
				f(t, n, web, p.major)
			})
		})
	}
}

// Requests and answers of any size arrive whole, many at once, also on connections that are used again.
func TestRequestsArriveWhole(t *testing.T) {
	onHTTP(t, func(network) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			w.Header().Set("Path", fmt.Sprint(r.ProtoMajor, " ", r.URL.Path))
			_, _ = w.Write(bytes.ToUpper(body))
		})
	}, func(t *testing.T, n network, web *httptest.Server, major int) {
		var all sync.WaitGroup
		for worker := range 4 {
			all.Go(func() {
				for i := range scaled(20, 4) {
					text := strings.Repeat(fmt.Sprint("text", worker, "-", i, " "), 7000*(i%3))
					path := fmt.Sprintf("/%d/%d", worker, i)
					resp, err := web.Client().Post(web.URL+path, "text/plain", strings.NewReader(text))
					if err != nil {
						t.Error(err)
						return
					}
					body, err := io.ReadAll(resp.Body)
					_ = resp.Body.Close()
					if err != nil || string(body) != strings.ToUpper(text) {
						t.Errorf("%d bytes, %v, want %d", len(body), err, len(text))
					}
					if want := fmt.Sprint(major, " ", path); resp.ProtoMajor != major || resp.Header.Get("Path") != want {
						t.Errorf("HTTP/%d, %q, want %q", resp.ProtoMajor, resp.Header.Get("Path"), want)
					}
				}
			})
		}
		all.Wait()
	})
}

// A long answer arrives whole, though the network strikes in the middle of it.
func TestDownloadOutlivesTrouble(t *testing.T) {
	const size, parts = 2 << 20, 32
	data := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{}).Read(data)
	onHTTP(t, func(n network) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			for i := range parts {
				if i == parts/3 || i == 2*parts/3 {
					n.strike()
				}
				if _, err := w.Write(data[i*size/parts : (i+1)*size/parts]); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}, func(t *testing.T, n network, web *httptest.Server, _ int) {
		resp, err := web.Client().Get(web.URL)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		sum := sha256.New()
		if got, err := io.Copy(sum, resp.Body); got != size || err != nil || [sha256.Size]byte(sum.Sum(nil)) != sha256.Sum256(data) {
			t.Errorf("%d bytes, %v, or other ones", got, err)
		}
	})
}

// A part of an answer that was flushed arrives while the handler waits, as events for a browser must. The handler's
// context ends when its client leaves.
func TestFlushedPartsArriveAtOnce(t *testing.T) {
	left := make(chan struct{}, 16)
	onHTTP(t, func(network) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintln(w, "event")
			if err := http.NewResponseController(w).Flush(); err != nil {
				t.Error(err)
			}
			<-r.Context().Done()
			left <- struct{}{}
		})
	}, func(t *testing.T, n network, web *httptest.Server, _ int) {
		ctx, cancel := context.WithCancel(limited(t))
		req, err := http.NewRequestWithContext(ctx, "GET", web.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := web.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		event := make([]byte, 6)
		if _, err := io.ReadFull(resp.Body, event); err != nil || string(event) != "event\n" {
			t.Errorf("%q, %v", event, err)
		}
		cancel()
		<-left
	})
}

// A handler may take over its connection, as for a WebSocket. Bytes then flow both ways.
func TestHandlersTakeConnectionsOver(t *testing.T) {
	onNetworks(t, func(t *testing.T, n network) {
		web := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c, buffered, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
			_, _ = io.Copy(c, buffered)
		}))
		_ = web.Listener.Close()
		web.Listener = n.listener
		web.Start()
		t.Cleanup(web.Close)
		transport := &http.Transport{DialContext: n.dial}
		t.Cleanup(transport.CloseIdleConnections)
		req, err := http.NewRequestWithContext(limited(t), "GET", web.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header = http.Header{"Connection": {"Upgrade"}, "Upgrade": {"echo"}}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != http.StatusSwitchingProtocols {
			t.Fatal(resp.Status)
		}
		c := resp.Body.(io.ReadWriteCloser)
		defer c.Close()
		for i := range 3 {
			text := fmt.Sprintf("message %d", i)
			if _, err := io.WriteString(c, text); err != nil {
				t.Fatal(err)
			}
			echo := make([]byte, len(text))
			if _, err := io.ReadFull(c, echo); err != nil || string(echo) != text {
				t.Fatalf("%q, %v", echo, err)
			}
			if i == 0 {
				n.strike()
			}
		}
	})
}
