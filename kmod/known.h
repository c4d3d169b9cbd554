/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_KNOWN_H
#define SNIFFER_KNOWN_H

#include <net/sock.h>

struct sniffer_owner;

bool sniffer_known(const struct sock *sk);
void sniffer_known_keep(const struct sock *sk, struct sniffer_owner *owner, unsigned int version);
bool sniffer_known_looks(void);
bool sniffer_known_stranger(u64 cookie, u32 gains);
void sniffer_known_keep_stranger(u64 cookie, u32 gains);

#endif /* SNIFFER_KNOWN_H */
