"""The contract of every op: public function, argument checks, opaque op, fake, autograd."""
