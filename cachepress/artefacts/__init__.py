"""What is learned of a model: kept, found, read and checked, and what tells models apart."""
