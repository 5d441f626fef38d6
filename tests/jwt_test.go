package stream_test

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// The recipes with JWTs let streams pass, and keep strangers out, as those with configuration files do.
func TestJWTRecipesLetStreamsPass(t *testing.T) {
	for _, name := range []string{"one account", "answers only", "across accounts"} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			o := newOperator(t, nscCommands(t, name))
			p := &pair{server: streamtest.Run(t, streamtest.WithConfig(o.config(t)))}
			t.Cleanup(func() { p.finish(t) })
			srv := newService(t, p, stream.ServerParams{KeepAlive: 20 * time.Millisecond}, o.user(t, "producer")...)
			srv.handle(t, "svc.echo", echo)
			alice := p.newClient(t, stream.ClientParams{KeepAlive: 20 * time.Millisecond}, o.user(t, "alice")...)
			bob := p.newClient(t, stream.ClientParams{}, o.user(t, "bob")...)
			var group sync.WaitGroup
			for _, c := range []*stream.Client{alice, bob} {
				group.Go(func() { verifyEcho(t, c, "svc.echo", 300, 1, 100, 3000) })
			}
			group.Wait()
			verifyEcho(t, alice, "svc.echo", 3, 2<<20)

			denied := make(refusals, 8)
			stranger, err := p.server.Dial(append(o.user(t, "bob"), denied.option())...)
			if err != nil {
				t.Fatal(err)
			}
			defer stranger.Close()
			for _, subject := range []string{"_SINBOX.alice.>", "_SINBOX.producer.>", "svc.>", ">"} {
				if _, err := stranger.SubscribeSync(subject); err != nil || stranger.Flush() != nil {
					t.Fatal(err)
				}
				waitFor(t, "a refusal of "+subject, func() { <-denied })
			}
		})
	}
}

// nscCommands returns the commands in docs/PERMISSIONS.md under "# nsc: " and name.
func nscCommands(t *testing.T, name string) []string {
	t.Helper()
	doc, err := os.ReadFile("../docs/PERMISSIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?ms)^```sh\n# nsc: " + regexp.QuoteMeta(name) + "\n(.*?)^```$").FindSubmatch(doc)
	if block == nil {
		t.Fatalf("../docs/PERMISSIONS.md has no commands for %q", name)
	}
	return strings.Split(strings.TrimSpace(string(block[1])), "\n")
}

// operator does with the JWT library what the commands do with nsc.
type operator struct {
	key      nkeys.KeyPair
	accounts map[string]*account
	users    map[string][]byte // contents of their files of credentials
}

type account struct {
	key    nkeys.KeyPair
	claims *jwt.AccountClaims
}

func newOperator(t *testing.T, commands []string) *operator {
	t.Helper()
	key, err := nkeys.CreateOperator()
	if err != nil {
		t.Fatal(err)
	}
	o := &operator{key: key, accounts: make(map[string]*account), users: make(map[string][]byte)}
	for _, c := range commands {
		if err := o.run(c); err != nil {
			t.Fatalf("%s: %v", c, err)
		}
	}
	return o
}

// run executes "nsc add", with the flags that the document uses.
func (o *operator) run(command string) error {
	words := strings.Fields(strings.ReplaceAll(command, `"`, ""))
	if len(words) < 4 || words[0] != "nsc" || words[1] != "add" {
		return fmt.Errorf("not a command of nsc that the test knows")
	}
	kind, words := words[2], words[3:]
	name := ""
	if !strings.HasPrefix(words[0], "-") {
		name, words = words[0], words[1:]
	}
	f := flag.NewFlagSet(kind, flag.ContinueOnError)
	var (
		in        = f.String("account", "", "")
		sub       = f.String("allow-sub", "", "")
		pub       = f.String("allow-pub", "", "")
		responses = f.Int("allow-pub-response", 0, "")
		ttl       = f.Duration("response-ttl", 0, "")
		service   = f.Bool("service", false, "")
		subject   = f.String("subject", "", "")
		remote    = f.String("remote-subject", "", "")
		source    = f.String("src-account", "", "")
		answer    = f.String("response-type", "", "")
	)
	if err := f.Parse(words); err != nil {
		return err
	}
	if kind == "account" {
		key, err := nkeys.CreateAccount()
		if err != nil {
			return err
		}
		id, err := key.PublicKey()
		if err != nil {
			return err
		}
		o.accounts[name] = &account{key, jwt.NewAccountClaims(id)}
		return nil
	}
	a := o.accounts[*in]
	if a == nil {
		return fmt.Errorf("no account %q", *in)
	}
	switch {
	case kind == "export" && *service:
		a.claims.Exports.Add(&jwt.Export{Name: *subject, Subject: jwt.Subject(*subject), Type: jwt.Service, ResponseType: jwt.ResponseType(*answer)})
	case kind == "import" && *service && o.accounts[*source] != nil:
		a.claims.Imports.Add(&jwt.Import{Name: *remote, Subject: jwt.Subject(*remote), Account: o.accounts[*source].claims.Subject, Type: jwt.Service})
	case kind == "user":
		key, err := nkeys.CreateUser()
		if err != nil {
			return err
		}
		id, err := key.PublicKey()
		if err != nil {
			return err
		}
		claims := jwt.NewUserClaims(id)
		claims.Sub.Allow.Add(strings.Split(*sub, ",")...)
		if *pub != "" {
			claims.Pub.Allow.Add(strings.Split(*pub, ",")...)
		}
		if *responses != 0 {
			claims.Resp = &jwt.ResponsePermission{MaxMsgs: *responses, Expires: *ttl}
		}
		token, err := claims.Encode(a.key)
		if err != nil {
			return err
		}
		seed, err := key.Seed()
		if err != nil {
			return err
		}
		o.users[name], err = jwt.FormatUserConfig(token, seed)
		return err
	default:
		return fmt.Errorf("not a command of nsc that the test knows")
	}
	return nil
}

// config returns the configuration of a server of the operator.
func (o *operator) config(t *testing.T) string {
	t.Helper()
	id, err := o.key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.NewOperatorClaims(id).Encode(o.key)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "operator: %s\nresolver: MEMORY\nresolver_preload: {\n", token)
	for _, a := range o.accounts {
		token, err := a.claims.Encode(o.key)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s: %s\n", a.claims.Subject, token)
	}
	return b.String() + "}\n"
}

// user is how a user of the operator connects.
func (o *operator) user(t *testing.T, name string) []nats.Option {
	t.Helper()
	if o.users[name] == nil {
		t.Fatalf("the commands add no user %q", name)
	}
	return []nats.Option{nats.UserCredentialBytes(o.users[name]), nats.CustomInboxPrefix("_SINBOX." + name)}
}
