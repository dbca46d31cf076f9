"""What travels between processes: envelopes, pickles, shared memory, links, and the credits that bound them."""
