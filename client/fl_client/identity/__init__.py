"""Who the site is to its coordinator: enrolment, certificates, renewal, rotated keys, HTTPS to the gateway."""
