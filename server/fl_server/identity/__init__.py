"""Who may connect: the certificate authority, sites and operators, and the rotation of the coordinator's keys."""
