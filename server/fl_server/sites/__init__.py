"""Sites: invitation, enrolment, revocation."""
