"""Text in, verified token shards out; never imports torch."""
