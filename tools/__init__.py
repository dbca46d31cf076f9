"""The `danaus` command and what it is made of. Run it as `danaus`; nothing here is imported by the runtime."""
