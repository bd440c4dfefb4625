"""Selection -> sub-network: rows from disk, assembled with the trunk."""
