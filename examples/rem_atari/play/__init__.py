"""Playing, in the game or in the world model: one rollout loop, collection and imagination."""
