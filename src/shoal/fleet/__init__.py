"""The shell around a cluster: who belongs to it, what starts its workers, who drives them."""
