"""Ray, as far as shards and jobs of one rank need it; the cluster is somebody else's, and is only used."""
