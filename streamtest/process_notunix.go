//go:build !unix

package streamtest

import "errors"

func (c *child) terminate() error { return errors.ErrUnsupported }
func (c *child) lameDuck() error  { return errors.ErrUnsupported }
func (c *child) pause() error     { return errors.ErrUnsupported }
func (c *child) resume() error    { return errors.ErrUnsupported }
