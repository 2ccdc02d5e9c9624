"""The top-K store: a teacher's distributions of the data set's supervised tokens, in few bytes."""
