"""What the strategies are written with: collectives, attention over one block or around a ring, sharded weights."""
