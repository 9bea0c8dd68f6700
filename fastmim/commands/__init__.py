"""One file per `fastmim <command>`: its flags, and what it prints. What it computes lies below."""
