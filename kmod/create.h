/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_CREATE_H
#define SNIFFER_CREATE_H

#include <net/sock.h>

bool sniffer_create(struct sock *sk, struct socket *sock);

#endif /* SNIFFER_CREATE_H */
