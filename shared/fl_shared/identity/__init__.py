"""Who signed it and whose key it is: Ed25519 keys, signed documents, fingerprints, proofs at enrolment."""
