"""The two networks of replaced token detection, from attention up to losses."""
