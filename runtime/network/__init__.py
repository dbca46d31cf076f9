"""Many hosts: keys and daemons, the links between agents, what they carry, and the tree that it goes by."""
