"""Memory, interrupts and compiled programs of the machine that a run is on."""
