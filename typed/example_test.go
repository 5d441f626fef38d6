package typed_test

import (
	"context"
	"fmt"
	"log"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/typed"
)

func Example() {
	type Query struct{ Symbol string }
	type Price struct{ Cents int }

	nc, err := nats.Connect(nats.DefaultURL)
	if err != nil {
		log.Fatal(err)
	}
	defer nc.Close()

	server, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()
	if _, err := typed.Handle(server, "prices", func(s *typed.ServerStream[Query, Price]) error {
		for i := range 3 {
			if err := s.Send(Price{100 + i}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		log.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		log.Fatal(err)
	}

	client, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	s, err := typed.Open[Query, Price](context.Background(), client, "prices", Query{"X"})
	if err != nil {
		log.Fatal(err)
	}
	for price, err := range s.All() {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(price.Cents)
	}
	// Prints:
	// 100
	// 101
	// 102
}
