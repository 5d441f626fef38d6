package concurrency_test

import (
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/natsstream/stream/concurrency"
)

func Example() {
	results := make(chan *concurrency.AsyncResult[int])
	go func() {
		defer close(results)
		for _, s := range []string{"12", "30", "x"} {
			results <- concurrency.NewAsyncResult(strconv.Atoi(s))
		}
	}()
	for r := range results {
		v, err := r.ValueOrError()
		fmt.Println(v, err)
	}
	// Output:
	// 12 <nil>
	// 30 <nil>
	// 0 strconv.Atoi: parsing "x": invalid syntax
}

func ExampleAsyncResult_MarshalJSON() {
	for _, r := range []*concurrency.AsyncResult[int]{
		concurrency.NewAsyncValue(42),
		concurrency.NewAsyncError[int](fmt.Errorf("job %d failed", 7)),
	} {
		b, _ := json.Marshal(r)
		fmt.Println(string(b))
	}
	// Output:
	// {"value":42}
	// {"error":"job 7 failed"}
}
