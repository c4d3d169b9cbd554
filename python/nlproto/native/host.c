/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/openat2.h>
#include <linux/sock_diag.h>
#include <linux/tcp.h>
#include <linux/virtio_net.h>
#include <netinet/in.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shared_proto.h"
#include "host.h"

_Static_assert(sizeof(((struct host_snap *)0)->data) == SNIFFER_SNAP_LEN, "snap");

enum parsed { RECORDED, FRAGMENT, TRUNCATED, OTHER };

static uint16_t load16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static enum parsed parse_ports(const uint8_t *l4, const uint8_t *end, uint32_t ip_len,
			       struct sniffer_record *r)
{
	uint32_t l4_len = 8;

	if (end - l4 < 8)
		return TRUNCATED;
	r->sport = load16(l4);
	r->dport = load16(l4 + 2);
	if (r->proto == IPPROTO_TCP) {
		if (end - l4 < 14)
			return TRUNCATED;
		l4_len = (l4[12] >> 4) * 4u;
		r->tcp_flags = l4[13];
	}
	r->hdr_len = ip_len + l4_len > 255 ? 255 : (uint8_t)(ip_len + l4_len);
	return RECORDED;
}

static enum parsed parse_v4(const uint8_t *ip, const uint8_t *end, struct sniffer_record *r)
{
	uint32_t ip_len;

	if (end - ip < 20)
		return TRUNCATED;
	ip_len = (ip[0] & 15) * 4u;
	if (ip_len < 20 || (uint32_t)(end - ip) < ip_len)
		return TRUNCATED;
	r->family = AF_INET;
	r->proto = ip[9];
	if (r->proto != IPPROTO_TCP && r->proto != IPPROTO_UDP)
		return OTHER;
	if (load16(ip + 6) & 0x1fff)
		return FRAGMENT;
	if (load16(ip + 2))	/* 0: larger than 64 KiB (BIG TCP) */
		r->len = load16(ip + 2);
	memcpy(r->saddr, ip + 12, 4);
	memcpy(r->daddr, ip + 16, 4);
	return parse_ports(ip + ip_len, end, ip_len, r);
}

static enum parsed parse_v6(const uint8_t *ip, const uint8_t *end, struct sniffer_record *r)
{
	const uint8_t *at = ip + 40;
	uint8_t next;

	if (end - ip < 40)
		return TRUNCATED;
	r->family = AF_INET6;
	if (load16(ip + 4))
		r->len = 40u + load16(ip + 4);
	memcpy(r->saddr, ip + 8, 16);
	memcpy(r->daddr, ip + 24, 16);
	next = ip[6];
	while (next != IPPROTO_TCP && next != IPPROTO_UDP) {
		if (end - at < 8)
			return TRUNCATED;
		switch (next) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
			next = at[0];
			at += (at[1] + 1) * 8;
			break;
		case IPPROTO_FRAGMENT:
			if (load16(at + 2) & 0xfff8)
				return FRAGMENT;
			next = at[0];
			at += 8;
			break;
		case IPPROTO_AH:
			next = at[0];
			at += (at[1] + 2) * 4;
			break;
		default:
			return OTHER;
		}
		if (at > end)
			return TRUNCATED;
	}
	r->proto = next;
	return parse_ports(at, end, (uint32_t)(at - ip), r);
}

static void fill_segments(const struct virtio_net_hdr *vnet, struct sniffer_record *r)
{
	uint32_t payload = r->len > r->hdr_len ? r->len - r->hdr_len : 0;

	r->gso_segs = 1;
	if (vnet->gso_type != VIRTIO_NET_HDR_GSO_NONE && vnet->gso_size && payload)
		r->gso_segs = (uint16_t)((payload + vnet->gso_size - 1) / vnet->gso_size);
}

static void fill_snap(const struct tpacket2_hdr *h, struct host_snap *snap)
{
	uint32_t there = h->tp_snaplen - (uint32_t)(h->tp_net - h->tp_mac);

	snap->caplen = there < SNIFFER_SNAP_LEN ? there : SNIFFER_SNAP_LEN;
	memcpy(snap->data, (const uint8_t *)h + h->tp_net, snap->caplen);
}

static enum parsed parse_frame(const struct host_ring *ring, const struct tpacket2_hdr *h,
			       struct sniffer_record *r, struct host_frame *f)
{
	const uint8_t *base = (const uint8_t *)h;
	const struct sockaddr_ll *ll;
	struct virtio_net_hdr vnet = { 0 };
	const uint8_t *ip = base + h->tp_net;
	const uint8_t *end = base + h->tp_mac + h->tp_snaplen;
	uint32_t link_len = (uint32_t)(h->tp_net - h->tp_mac);
	enum parsed result;

	memset(r, 0, sizeof(*r));
	ll = (const void *)(base + TPACKET_ALIGN(sizeof(*h)));
	if (h->tp_net < h->tp_mac || end > base + ring->size || ip >= end)
		return TRUNCATED;
	r->len = h->tp_len > link_len ? h->tp_len - link_len : 0;
	result = (ip[0] >> 4) == 4 ? parse_v4(ip, end, r) :
		 (ip[0] >> 4) == 6 ? parse_v6(ip, end, r) : OTHER;
	if (result != RECORDED)
		return result;
	r->time_ns = (uint64_t)((int64_t)h->tp_sec * 1000000000 + h->tp_nsec + ring->mono_offset);
	r->netns = ring->netns;
	r->ifindex = (uint32_t)ll->sll_ifindex;
	r->dir = ll->sll_pkttype == PACKET_OUTGOING ? SNIFFER_DIR_OUT : SNIFFER_DIR_IN;
	f->to_all = ll->sll_pkttype == PACKET_MULTICAST || ll->sll_pkttype == PACKET_BROADCAST;
	if (ring->vnet)
		memcpy(&vnet, base + h->tp_mac - sizeof(vnet), sizeof(vnet));
	fill_segments(&vnet, r);
	return RECORDED;
}

uint32_t host_ring_read(struct host_ring *ring, struct sniffer_record *records,
			struct host_frame *frames, uint32_t max)
{
	uint32_t n = 0;

	while (n < max) {
		struct tpacket2_hdr *h =
			(void *)(ring->frames + (size_t)ring->at * ring->size);

		if (!(__atomic_load_n(&h->tp_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
			break;
		ring->packets++;
		switch (parse_frame(ring, h, &records[n], &frames[n])) {
		case RECORDED:
			if (ring->snaps)
				fill_snap(h, &ring->snaps[n]);
			n++;
			break;
		case FRAGMENT:
			ring->fragments++;
			break;
		case TRUNCATED:
			ring->truncated++;
			break;
		case OTHER:
			ring->other++;
			break;
		}
		__atomic_store_n(&h->tp_status, TP_STATUS_KERNEL, __ATOMIC_RELEASE);
		ring->at = (ring->at + 1) % ring->count;
	}
	return n;
}

uint32_t host_ring_waiting(const struct host_ring *ring)
{
	uint32_t n = 0;

	while (n < ring->count) {
		uint32_t at = (ring->at + n) % ring->count;
		struct tpacket2_hdr *h = (void *)(ring->frames + (size_t)at * ring->size);

		if (!(__atomic_load_n(&h->tp_status, __ATOMIC_ACQUIRE) & TP_STATUS_USER))
			break;
		n++;
	}
	return n;
}

uint32_t host_frame_size(uint32_t snap)
{
	uint32_t need = TPACKET2_HDRLEN + 64 + sizeof(struct virtio_net_hdr) + snap;
	uint32_t size = 256;

	while (size < need)	/* a power of two, so that frames never straddle blocks */
		size *= 2;
	return size;
}

int host_capture_all(int fd)
{
	struct sockaddr_ll ll = {
		.sll_family = AF_PACKET,
		.sll_protocol = htons(ETH_P_ALL),
	};

	return bind(fd, (struct sockaddr *)&ll, sizeof(ll)) ? -errno : 0;
}

uint32_t host_diag_request(uint8_t *buf, uint32_t seq, uint8_t family, uint8_t proto, int dump,
			   const uint8_t *saddr, uint16_t sport, const uint8_t *daddr,
			   uint16_t dport, uint32_t ifindex, uint32_t states, int with_tcp_info)
{
	struct {
		struct nlmsghdr nlh;
		struct inet_diag_req_v2 req;
	} m;

	memset(&m, 0, sizeof(m));
	m.nlh.nlmsg_len = sizeof(m);
	m.nlh.nlmsg_type = SOCK_DIAG_BY_FAMILY;
	m.nlh.nlmsg_flags = NLM_F_REQUEST | (dump ? NLM_F_DUMP : 0);
	m.nlh.nlmsg_seq = seq;
	m.req.sdiag_family = family;
	m.req.sdiag_protocol = proto;
	m.req.idiag_states = states;
	if (with_tcp_info)
		m.req.idiag_ext = 1 << (INET_DIAG_INFO - 1);
	m.req.id.idiag_sport = htons(sport);
	m.req.id.idiag_dport = htons(dport);
	memcpy(m.req.id.idiag_src, saddr, 16);
	memcpy(m.req.id.idiag_dst, daddr, 16);
	m.req.id.idiag_if = ifindex;
	m.req.id.idiag_cookie[0] = INET_DIAG_NOCOOKIE;
	m.req.id.idiag_cookie[1] = INET_DIAG_NOCOOKIE;
	memcpy(buf, &m, sizeof(m));
	return sizeof(m);
}

int host_diag_read(const uint8_t *buf, uint32_t len, uint32_t seq, uint8_t proto,
		   struct host_socket *sockets, uint32_t max, int *done)
{
	uint32_t at = 0, n = 0;

	*done = 0;
	while (at + sizeof(struct nlmsghdr) <= len) {
		struct nlmsghdr h;
		struct inet_diag_msg d;
		struct host_socket *s;
		int code = 0;

		memcpy(&h, buf + at, sizeof(h));
		if (h.nlmsg_len < sizeof(h) || h.nlmsg_len > len - at)
			return -EBADMSG;
		if (h.nlmsg_seq != seq)
			goto next;
		if (h.nlmsg_type == NLMSG_ERROR || h.nlmsg_type == NLMSG_DONE) {
			if (h.nlmsg_len >= sizeof(h) + sizeof(code))
				memcpy(&code, buf + at + sizeof(h), sizeof(code));
			*done = 1;
			return code < 0 ? code : (int)n;
		}
		if (h.nlmsg_len < sizeof(h) + sizeof(d))
			return -EBADMSG;
		if (n == max)
			return -ENOBUFS;
		memcpy(&d, buf + at + sizeof(h), sizeof(d));
		s = &sockets[n++];
		memset(s, 0, sizeof(*s));
		s->cookie = (uint64_t)d.id.idiag_cookie[1] << 32 | d.id.idiag_cookie[0];
		s->inode = d.idiag_inode;
		s->uid = d.idiag_uid;
		s->ifindex = d.id.idiag_if;
		s->sport = ntohs(d.id.idiag_sport);
		s->dport = ntohs(d.id.idiag_dport);
		s->family = d.idiag_family;
		s->proto = proto;
		s->state = d.idiag_state;
		memcpy(s->saddr, d.id.idiag_src, 16);
		memcpy(s->daddr, d.id.idiag_dst, 16);
next:
		at += NLMSG_ALIGN(h.nlmsg_len);
	}
	return (int)n;
}

/* The tcp_info behind a sock_diag message, of which the kernel may know less than we do. */
static int tcp_info_of(const uint8_t *at, const uint8_t *end, struct tcp_info *info)
{
	while (at + sizeof(struct nlattr) <= end) {
		struct nlattr a;

		memcpy(&a, at, sizeof(a));
		if (a.nla_len < sizeof(a) || a.nla_len > end - at)
			return 0;
		if (a.nla_type == INET_DIAG_INFO) {
			size_t size = a.nla_len - sizeof(a);

			memset(info, 0, sizeof(*info));
			memcpy(info, at + sizeof(a), size < sizeof(*info) ? size : sizeof(*info));
			return size >= offsetof(struct tcp_info, tcpi_pacing_rate);
		}
		if (NLA_ALIGN(a.nla_len) > end - at)
			return 0;
		at += NLA_ALIGN(a.nla_len);
	}
	return 0;
}

int host_tcp_read(const uint8_t *buf, uint32_t len, uint32_t seq, struct host_tcp *found,
		  uint32_t max, int *done)
{
	uint32_t at = 0, n = 0;

	*done = 0;
	while (at + sizeof(struct nlmsghdr) <= len) {
		struct tcp_info info;
		struct inet_diag_msg d;
		struct nlmsghdr h;
		int code = 0;

		memcpy(&h, buf + at, sizeof(h));
		if (h.nlmsg_len < sizeof(h) || h.nlmsg_len > len - at)
			return -EBADMSG;
		if (h.nlmsg_seq != seq)
			goto next;
		if (h.nlmsg_type == NLMSG_ERROR || h.nlmsg_type == NLMSG_DONE) {
			if (h.nlmsg_len >= sizeof(h) + sizeof(code))
				memcpy(&code, buf + at + sizeof(h), sizeof(code));
			*done = 1;
			return code < 0 ? code : (int)n;
		}
		if (h.nlmsg_len < sizeof(h) + sizeof(d))
			return -EBADMSG;
		if (n == max)
			return -ENOBUFS;
		memcpy(&d, buf + at + sizeof(h), sizeof(d));
		if (!d.id.idiag_dport ||
		    !tcp_info_of(buf + at + sizeof(h) + sizeof(d), buf + at + h.nlmsg_len, &info))
			goto next;
		found[n++] = (struct host_tcp){
			.cookie = (uint64_t)d.id.idiag_cookie[1] << 32 | d.id.idiag_cookie[0],
			.rtt_us = info.tcpi_rtt,
			.retransmits = info.tcpi_total_retrans,
		};
next:
		at += NLMSG_ALIGN(h.nlmsg_len);
	}
	return (int)n;
}

int host_setns_net(int fd)
{
	return setns(fd, CLONE_NEWNET) ? -errno : 0;
}

/* The sockets in one open /proc/PID/fd, which is closed. */
static uint32_t held_by(DIR *dir, uint32_t pid, struct host_held *held, uint32_t max)
{
	struct dirent *entry;
	uint32_t n = 0;

	while (n < max && (entry = readdir(dir))) {
		char target[64];
		ssize_t len;

		if (entry->d_name[0] == '.')
			continue;
		len = readlinkat(dirfd(dir), entry->d_name, target, sizeof(target) - 1);
		if (len < 9)
			continue;
		target[len] = 0;
		if (strncmp(target, "socket:[", 8))
			continue;
		held[n].inode = strtoull(target + 8, NULL, 10);
		held[n].fd = (uint32_t)strtoul(entry->d_name, NULL, 10);
		held[n++].pid = pid;
	}
	closedir(dir);
	return n;
}

int host_held_sockets(int procfd, const uint32_t *pids, uint32_t count, struct host_held *held,
		      uint32_t max, uint32_t *refused)
{
	uint32_t n = 0;

	*refused = 0;
	for (uint32_t i = 0; i < count && n < max; i++) {
		char path[32];
		DIR *dir;
		int fd;

		snprintf(path, sizeof(path), "%u/fd", pids[i]);
		fd = openat(procfd, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		if (fd < 0 && (errno == EACCES || errno == EPERM || errno == EMFILE ||
			       errno == ENFILE))
			++*refused;
		if (fd < 0)
			continue;
		dir = fdopendir(fd);
		if (!dir) {
			close(fd);
			++*refused;
			continue;
		}
		n += held_by(dir, pids[i], held + n, max - n);
	}
	return (int)n;
}

int host_open_beneath(int directory, const char *path)
{
	struct open_how how = {
		.flags = O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC,
		.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV,
	};
	long fd = syscall(SYS_openat2, directory, path, &how, sizeof(how));

	return fd < 0 ? -errno : (int)fd;
}
