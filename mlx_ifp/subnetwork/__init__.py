"""Selection -> sub-network: its rows are read from disk and assembled with the trunk."""
