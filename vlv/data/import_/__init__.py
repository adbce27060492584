"""Foreign images made into our shards: decoded in parallel, resumable, in flat memory."""
