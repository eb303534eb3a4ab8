"""What comes in and goes out: reviews, the release's blocks, the Hub, adapters and models in the formats of others."""
