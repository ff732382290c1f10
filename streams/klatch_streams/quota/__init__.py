"""What admission counts: rules, counters, limits and the ledger of one tenant. Pure, as all deciders are."""
