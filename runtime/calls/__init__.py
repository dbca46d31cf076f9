"""How an endpoint is called and what comes back: adverbs, futures, streams, value meshes, ports."""
